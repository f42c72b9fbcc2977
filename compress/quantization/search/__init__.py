"""Sensitivity of layers, and the bits that each is given."""
