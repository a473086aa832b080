"""What every process inside a batch job needs; no torch."""
