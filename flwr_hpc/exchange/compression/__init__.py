"""Updates in fewer bytes, and what that leaves out brought along with the next ones."""
