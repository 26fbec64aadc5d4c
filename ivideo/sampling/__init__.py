"""From a prompt to a video file: the cascade, and the files that it writes."""
