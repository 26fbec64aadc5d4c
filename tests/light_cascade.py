"""Stages of the small cascade with light networks, and weights for them, which are quick to sample from."""

import light_network
import numpy as np
from shared_programs import random_params

from configs import cascade
from ivideo.weights import config_metadata, save_params


def save(folder, *names: str, **sample):
    """The config of the small cascade with light networks, of whose stages the folder gets STAGE.safetensors.

    `names`: of the stages. `sample`: values of `config.sample` of every stage.
    """
    config = cascade.get_config("small")
    options = light_network.OPTIONS | {f"sample.{key}": value for key, value in sample.items()}
    for stage in config.stages.values():
        stage.update_from_flattened_dict(options)
    for name in names:
        stage, path = config.stages[name], str(folder / f"{name}.safetensors")
        params = random_params(stage, scale=0.15)
        save_params(path, params, metadata=config_metadata(stage), dtype=np.float32)
    return config
