"""How much of inserted passages a model recites."""
