"""From a machine, a hostfile or a Slurm allocation to ranks. Never imports torch."""
