"""Adapters: their rank at a site, and what goes into the weights under them."""
