"""Train one language model across several supercomputing centres with Flower."""

__version__ = "0.1.0"
