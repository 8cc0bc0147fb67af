"""Whole-or-absent checkpoints: saving, restoring, and what they say of themselves."""
