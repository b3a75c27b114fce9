"""Breaks single lines of the library, each of which some test must see.

    python -m tests.mutants                      all of them: takes hours
    python -m tests.mutants --only window.py     those of files that end so
    python -m tests.mutants --changed main       those of files changed since a commit

Each break is made in a copy of the tree, where the tests named beside it must fail.
"""
