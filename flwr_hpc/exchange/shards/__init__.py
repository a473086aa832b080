"""Weights in several files, each with some rows of the tensors."""
