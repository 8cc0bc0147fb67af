"""BIG-bench-Lite: its 24 tasks from their JSON files, as BIG-bench's own seqio code forms them."""
