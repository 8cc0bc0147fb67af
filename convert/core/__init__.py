"""What every form of a checkpoint shares: names, tensors, interfaces."""
