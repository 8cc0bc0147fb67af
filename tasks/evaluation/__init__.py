"""The published benchmarks besides BIG-bench-Lite; catalogue.py lists them."""
