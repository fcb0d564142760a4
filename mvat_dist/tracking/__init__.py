"""The record of a run and W&B's copy of it."""
