"""Kernels of softmax attention: what the mechanisms compute with, each a file."""
