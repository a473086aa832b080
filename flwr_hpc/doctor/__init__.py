"""``python -m flwr_hpc.doctor``: what usually goes wrong at a facility, found before a run."""
