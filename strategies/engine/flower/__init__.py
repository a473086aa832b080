"""Flower's own strategies over the event loop."""
