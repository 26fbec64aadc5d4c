"""ivideo: Imagen Video (Ho et al. 2022, arXiv 2210.02303) in JAX and Flax, for TPUs."""

__version__ = "0.1.0"
