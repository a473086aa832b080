"""PBS Professional (OpenPBS)."""
