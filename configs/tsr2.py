"""The second temporal super-resolution: 32 to 64 frames of 192 × 320, 6 to 12 per second. Section 2.3.

paper  780M parameters. python -m ivideo.main --config=configs/tsr2.py --config.data.dir=DIR --workdir=DIR
       12 GB of float32 parameters, their average and Adam's moments, divided over the devices. 64 chips of v5p
       or v6e take 256 videos per step: docs/tpu.md.
demo   a stage of the small cascade in the package, on the captioned shapes. launch/train_demo.sh FOLDER tsr2 trains it:
       25 minutes for 1,800 steps on two cores of an AMD EPYC, 1.7 GB of memory.
small  a network of a few thousand parameters, for tests.
"""

from configs import common, common_machines


def get_config(variant: str = "paper"):
    return common.variant(variant, paper=paper, demo=demo, small=small)


def paper():
    """32 to 64 frames of 192 × 320. Our widths and depths match the printed parameter count."""
    config = common.stage("tsr2", "paper")
    config.model.channels = (128, 256, 512, 1024)
    config.model.blocks = (2, 2, 6, 8)
    config.model.strides = (2, 2, 2, 2)
    config.model.spatial_attention = (False, False, False, False)
    config.model.cross_attention = (False, False, False, True)
    config.model.temporal = ("convolution", "convolution", "convolution", "convolution")
    config.sample.mesh = common.mesh(frames=-1)
    return config


def demo(variant="demo"):
    """32 to 64 frames of 96 × 160, on the captioned shapes."""
    config = common.stage("tsr2", variant)
    config.model.channels = (32, 64)
    config.model.blocks = (1, 1)
    config.model.strides = (2, 2)
    config.model.spatial_attention = (False, False)
    config.model.cross_attention = (False, True)
    config.model.temporal = ("convolution", "convolution")
    config.model.head_dim = 32
    config.model.data_std = 0.025  # of a clip about its upsampled low-resolution clip
    common_machines.refining_on_one_machine(config)
    config.train.steps = 1800
    config.train.learning_rate = 2e-3
    config.train.crop_frames, config.train.crop_height, config.train.crop_width = 6, 48, 48
    config.train.augmentation_min = 9.0
    config.sample.augmentation_snr = 1e5
    config.sample.batch = 4  # bounds memory
    return config


def small():
    """The demo's kinds of layer at sizes that train in seconds."""
    return common_machines.shrunk(demo("small"))
