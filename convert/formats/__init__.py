"""The forms of checkpoints: ours, t5x, Hugging Face."""
