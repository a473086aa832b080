"""Throw-away Slurm clusters on this machine, each in namespaces of its own."""
