"""Products of rows grouped by expert, without padding to a capacity."""
