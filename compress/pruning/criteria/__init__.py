"""Criteria of unstructured pruning, one a file."""
