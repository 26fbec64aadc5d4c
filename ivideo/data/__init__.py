"""Videos and captions: sources, reading and writing of files, and the input pipeline."""
