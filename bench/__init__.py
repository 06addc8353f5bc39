"""Measurements of the kernels, and what can be known of them without a GPU."""
