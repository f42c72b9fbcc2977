"""Stored formats of packed weights."""
