"""Real clusters in the small: a SLURM of two nodes, and hosts with ssh, all on this one machine."""
