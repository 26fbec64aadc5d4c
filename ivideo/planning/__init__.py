"""Estimates a run before it starts: sizes and FLOPs, compilation for TPU slices, benchmarks on this machine."""
