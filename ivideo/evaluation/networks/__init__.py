"""The networks whose features measures compare: I3D, Inception-v3 and CLIP, and readers of their published weights."""
