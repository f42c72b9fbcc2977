"""Structured pruning: units taken out of the tensors."""
