"""Flower's programs in a session: their commands, their restarts, their certain end."""
