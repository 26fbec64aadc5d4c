"""Trains a stage: the training step, the loop, checkpoints, reports, and protection against signals and hangs."""
