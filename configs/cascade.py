"""The cascade of seven stages: text to 128 × 768 × 1280 at 24 frames per second. Section 2.2.

Every value of a stage can be set, as in --config.stages.ssr3.sample.steps=64.
"""

import ml_collections

from configs import base, common, ssr1, ssr2, ssr3, tsr1, tsr2, tsr3

STAGES = {"base": base, "tsr1": tsr1, "ssr1": ssr1, "ssr2": ssr2, "tsr2": tsr2, "tsr3": tsr3, "ssr3": ssr3}


def get_config(variant: str = "paper"):
    if variant not in common.CASCADE:
        raise common.unknown_variant(variant, common.CASCADE)
    config = ml_collections.ConfigDict()
    config.stage = "cascade"
    config.variant = variant
    config.order = tuple(common.CASCADE[variant])  # the stages as they run; a ConfigDict sorts its keys
    # Prompts per group. A stage samples the videos of a whole group before the next stage starts. The weights of every
    # stage and the text encoder are loaded once per group, and a group's clips are kept in the host's memory between
    # two stages: 47 MB per clip of 64×192×320
    config.sample = ml_collections.ConfigDict()
    config.sample.group = 32
    config.evaluate = common.evaluation()
    config.stages = ml_collections.ConfigDict()
    for name in common.CASCADE[variant]:
        config.stages[name] = STAGES[name].get_config(variant)
    if variant == "demo":
        _expect_generated(config.stages)
    return config.lock()


def _expect_generated(stages):
    """Sets how the demo stages sample from generated clips; their own configs are for true low-resolution clips.

    The base generates blobs of the right colour, position and motion. Blur and guidance make ssr1 draw the shape that
    the text names.
    """
    stages.ssr1.sample.augmentation_snr = 2000.0
    stages.ssr1.sample.augmentation_blur = 1.0
    stages.ssr1.sample.weight = 1.0
    stages.ssr1.sample.steps = 2
    stages.ssr2.sample.augmentation_snr = 1000.0
