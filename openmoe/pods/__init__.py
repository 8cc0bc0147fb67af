"""A run on a machine that is not here: compiled for it, measured in bytes, FLOPs and seconds."""
