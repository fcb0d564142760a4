"""The fault matrix: what a run on two ranks survives, and when. ``python -m tests.faults --help``."""
