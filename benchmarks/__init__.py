"""Benchmarks of `flood_optax`: one question per module, `python -m benchmarks`."""
