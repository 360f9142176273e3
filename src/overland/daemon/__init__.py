"""Where parts are joined into the two daemons, and nowhere else."""
