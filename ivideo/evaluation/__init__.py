"""Measures the quality of a trained stage or cascade."""
