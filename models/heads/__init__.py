"""Heads: what a model reads from the residual stream, one a file."""
