"""The first temporal super-resolution: 16 to 32 frames of 24 × 40, 3 to 6 per second. Section 2.3.

paper  1.7B parameters. python -m ivideo.main --config=configs/tsr1.py --config.data.dir=DIR --workdir=DIR
       27 GB of float32 parameters, their average and Adam's moments, divided over the devices. 64 chips of v5p
       or v6e take 256 videos per step: docs/tpu.md.
demo   a stage of the small cascade in the package, on the captioned shapes. launch/train_demo.sh FOLDER tsr1 trains it:
       20 minutes or less on two cores of an AMD EPYC, 1.7 GB of memory. The loss of the weights in the
       package was not yet in units of data_std.
small  a network of a few thousand parameters, for tests.
"""

from configs import common, common_machines


def get_config(variant: str = "paper"):
    return common.variant(variant, paper=paper, demo=demo, small=small)


def paper():
    """16 to 32 frames of 24 × 40. Our widths and depths match the printed parameter count."""
    config = common.stage("tsr1", "paper")
    config.model.channels = (640, 1280, 1280)
    config.model.blocks = (4, 6, 6)
    config.model.strides = (1, 2, 2)
    config.model.spatial_attention = (False, False, True)
    config.model.cross_attention = (False, False, True)
    config.model.temporal = ("convolution", "convolution", "convolution")
    config.sample.mesh = common.mesh(frames=-1)
    return config


def demo(variant="demo"):
    """16 to 32 frames of 12 × 20, on the captioned shapes."""
    config = common.stage("tsr1", variant)
    config.model.channels = (64, 128)
    config.model.blocks = (1, 1)
    config.model.strides = (2, 2)
    config.model.spatial_attention = (False, True)
    config.model.cross_attention = (False, True)
    config.model.temporal = ("convolution", "convolution")
    config.model.head_dim = 32
    config.model.data_std = 0.02  # of a clip about its upsampled low-resolution clip
    common_machines.refining_on_one_machine(config)
    config.train.steps = 2000
    config.train.learning_rate = 1.5e-3
    config.train.crop_frames = 8
    config.train.augmentation_min = 9.0
    config.sample.steps = 2
    config.sample.augmentation_snr = 1e5
    return config


def small():
    """The demo's kinds of layer at sizes that train in seconds."""
    return common_machines.shrunk(demo("small"))
