"""What is done with a checkpoint or a run afterwards."""
