"""Solvers of the layer-wise error: they choose what stays by what it does to the layer's outputs. One a file."""
