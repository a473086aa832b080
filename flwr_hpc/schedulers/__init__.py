"""Batch systems: one folder each, one executor loop above them."""
