"""Kernels of packed weights, and the dispatch table."""
