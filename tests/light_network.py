"""A network of a few convolutions, for tests of what is around it: it is traced and compiled in a third of the time."""

OPTIONS = {"model.spatial_attention": (False,), "model.cross_attention": (False,), "model.temporal": ("none",)}
ARGUMENTS = [f"--config.{key}={value}" for key, value in OPTIONS.items()]
