"""Using a model: opening, placing, decoding, scoring."""
