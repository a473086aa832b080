"""Sweeps: the same run at many settings, and the table of what each came to."""
