"""Gin files of t5x and flaxformer, said in our names; nothing is imported or run."""
