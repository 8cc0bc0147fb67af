"""What surrounds the steps of a run."""
