"""From a facility's files to batches of token sequences."""
