"""What type checkers make of user code: `python -m tests.typing`."""
