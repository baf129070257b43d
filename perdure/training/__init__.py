"""Training: the loop over tasks, the trainer, runs and their checkpoints."""
