"""The shared core: pure PyTorch, one device, no Lightning."""

from models.cpu import guard_onednn

guard_onednn()  # before the first bf16 product of the process: see models/cpu.py
