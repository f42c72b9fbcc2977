"""Paths that only a CPU takes. `dispatch.py` is the table: which there are, when each is taken, what it gained."""
