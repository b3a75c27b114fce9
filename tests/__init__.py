"""Tests by purpose: modules, contract, around (other tools), claims, benchmarks."""
