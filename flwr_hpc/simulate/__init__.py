"""A federation in virtual time: the same strategies, on facilities that are models."""
