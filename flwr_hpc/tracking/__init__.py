"""Event log, live view, report, summary, Weights & Biases."""
