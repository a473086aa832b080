"""Who may speak to Flower's servers on a host that has other users: this user, nobody else."""
