"""report.html: what a run was, on one page."""
