"""Launchers of ranks on a machine, a hostfile's hosts or Slurm. Never imports torch."""
