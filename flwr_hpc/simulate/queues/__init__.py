"""How long a simulated job waits: batch queues as models."""
