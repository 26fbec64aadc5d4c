"""Videos and captions: where they come from, how files are read and written, the order in which they arrive."""
