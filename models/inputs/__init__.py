"""Inputs: what becomes the residual stream, one a file."""
