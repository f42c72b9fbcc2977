"""Formats of other software, one a file."""
