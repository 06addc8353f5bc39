"""Benchmarks of the kernels, and analyses of them that need no GPU."""
