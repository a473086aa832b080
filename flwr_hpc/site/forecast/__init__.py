"""How long a job will wait in the queue."""
