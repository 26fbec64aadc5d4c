"""The cascade of seven stages: text to 128 × 768 × 1280 at 24 frames a second. Section 2.2.

Every value of a stage can be set through it: --config.stages.ssr3.sample.steps=64.
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
    # Prompts that a stage makes its videos of before the next stage does. Each stage's weights and the text encoder are
    # loaded once for each group; a group's videos between two stages are in the host's memory: 47 MB each of 64×192×320
    config.sample = ml_collections.ConfigDict()
    config.sample.group = 32
    config.stages = ml_collections.ConfigDict()
    for name in common.CASCADE[variant]:
        config.stages[name] = STAGES[name].get_config(variant)
    if variant == "demo":
        _expect_generated(config.stages)
    return config.lock()


def _expect_generated(stages):
    """The small stages' sampling of what another stage made, where their own configs expect true clips.

    The base draws blobs of the right colour, place and motion. Blur and guidance let ssr1 draw the text's shape.
    """
    stages.ssr1.sample.augmentation_snr = 2000.0
    stages.ssr1.sample.augmentation_blur = 1.0
    stages.ssr1.sample.weight = 1.0
    stages.ssr1.sample.steps = 2
    stages.ssr2.sample.augmentation_snr = 1000.0
