"""The driver and the two Flower apps."""
