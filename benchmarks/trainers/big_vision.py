"""big_vision, which is no package: its row says so, and a test stands in for it."""

TITLE = "big_vision `train.py`"
SECTION = "big_vision"
REQUIREMENTS = ("big_vision",)
ABSENT = (
    "It is a repository of scripts and no package, so there is nothing to install. "
    "A stand-in of its loss and step is in the tests."
)
