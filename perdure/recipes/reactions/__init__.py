"""Yields of reactions, task after task: the command, what it writes, and what a laboratory does with the model."""
