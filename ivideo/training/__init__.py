"""Training a stage: the step, the loop around it, checkpoints, reports, and what guards a run."""
