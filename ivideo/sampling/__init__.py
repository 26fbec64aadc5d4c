"""Samples videos from text prompts with a stage or the cascade, and writes them to files."""
