"""Triton kernels and the functions that launch them. They take and return tensors, without autograd."""
