"""A model goes in, a smaller model comes out: pure PyTorch."""
