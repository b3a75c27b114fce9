"""big_vision, which is no package: its row says so, and a test stands in for it."""

TITLE = "big_vision `train.py`"
SECTION = "big_vision"
REQUIREMENTS = ("big_vision==0.0.0",)  # any release would do; there is none
