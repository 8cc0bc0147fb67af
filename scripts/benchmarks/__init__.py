"""Benchmarks; each prints figures, with --json as one object."""
