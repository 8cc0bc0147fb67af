"""Text to batches: objectives, packing and the resumable global stream. Needs TensorFlow."""
