"""A tiny Flower PyTorch app."""
