"""Chips, meshes and hosts: where arrays lie, and how several processes act as one."""
