"""Allocations of sparsity to the layers, one a file."""
