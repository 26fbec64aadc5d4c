"""Turns folders, tables and tar files of videos or images into a data set for training (mode prepare_data)."""
