"""The shared core: pure PyTorch, one device, no Lightning."""
