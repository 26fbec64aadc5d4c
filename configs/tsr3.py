"""The third temporal super-resolution: 64 to 128 frames of 192 × 320, 12 to 24 per second. Section 2.3.

paper  630M parameters. python -m ivideo.main --config=configs/tsr3.py --config.data.dir=DIR --workdir=DIR
       10 GB of float32 parameters, their average and Adam's moments, divided over the devices. 64 chips of v5p
       or v6e take 256 videos per step: docs/tpu.md.
demo   a stage of the small cascade in the package, on the captioned shapes. launch/train_demo.sh FOLDER tsr3 trains it,
       starting from the weights of tsr2: 25 minutes for 1,500 steps on two cores of an AMD EPYC, 1.7 GB of memory.
small  a network of a few thousand parameters, for tests.
"""

from configs import common, common_machines


def get_config(variant: str = "paper"):
    return common.variant(variant, paper=paper, demo=demo, small=small)


def paper():
    """64 to 128 frames of 192 × 320. Our widths and depths match the printed parameter count."""
    config = common.stage("tsr3", "paper")
    config.model.channels = (128, 256, 512, 1024)
    config.model.blocks = (2, 4, 6, 6)
    config.model.strides = (2, 2, 2, 2)
    config.model.spatial_attention = (False, False, False, False)
    config.model.cross_attention = (False, False, False, True)
    config.model.temporal = ("convolution", "convolution", "convolution", "convolution")
    config.sample.mesh = common.mesh(frames=-1)
    return config


def demo(variant="demo"):
    """64 to 128 frames of 96 × 160, on the captioned shapes."""
    config = common.stage("tsr3", variant)
    config.model.channels = (32, 64)
    config.model.blocks = (1, 1)
    config.model.strides = (2, 2)
    config.model.spatial_attention = (False, False)
    config.model.cross_attention = (False, True)
    config.model.temporal = ("convolution", "convolution")
    config.model.head_dim = 32
    config.model.data_std = 0.025  # as tsr2, whose weights it starts from
    common_machines.refining_on_one_machine(config)
    config.train.steps = 1500
    config.train.learning_rate = 1e-3
    config.train.crop_frames, config.train.crop_height, config.train.crop_width = 6, 48, 48
    config.train.augmentation_min = 11.0
    config.sample.augmentation_snr = 1e6
    config.sample.batch = 2  # bounds memory
    return config


def small():
    """The demo's kinds of layer at sizes that train in seconds."""
    return common_machines.shrunk(demo("small"))
