"""Attention mechanisms, one a file, behind the protocol of `protocol.py`; what they compute with is in `kernels`."""
