"""The proof that a run survives: a small twin of it, killed again and again, and compared."""
