"""Evaluation tasks to result files and figures."""
