"""Before a run: a stage's sizes and cost, programs compiled for TPU slices, speed measured here."""
