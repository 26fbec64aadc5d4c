"""The second spatial super-resolution: 48 × 80 to 192 × 320 pixels, 32 frames. Section 2.3.

paper  1.2B parameters. python -m ivideo.main --config=configs/ssr2.py --config.data.dir=DIR --workdir=DIR
       19 GB of float32 parameters, their average and Adam's moments, divided over the devices. 64 chips of v5p
       or v6e take 256 videos per step: docs/tpu.md.
demo   a stage of the small cascade in the package, on the captioned shapes. launch/train_demo.sh FOLDER ssr2 trains it:
       20 minutes or less on two cores of an AMD EPYC, 1.7 GB of memory. The loss of the weights in the
       package was not yet in units of data_std.
small  a network of a few thousand parameters, for tests.
"""

from configs import common, common_machines


def get_config(variant: str = "paper"):
    return common.variant(variant, paper=paper, demo=demo, small=small)


def paper():
    """48 × 80 to 192 × 320 pixels. Our widths and depths match the printed parameter count."""
    config = common.stage("ssr2", "paper")
    config.model.channels = (224, 448, 896, 1344)
    config.model.blocks = (2, 4, 4, 6)
    config.model.strides = (2, 2, 2, 2)
    config.model.spatial_attention = (False, False, False, True)
    config.model.cross_attention = (False, False, False, True)
    config.model.temporal = ("convolution", "convolution", "convolution", "convolution")
    config.sample.mesh = common.mesh(frames=-1)
    return config


def demo(variant="demo"):
    """24 × 40 to 96 × 160 pixels, on the captioned shapes."""
    config = common.stage("ssr2", variant)
    config.model.channels = (64, 96)
    config.model.blocks = (1, 2)
    config.model.strides = (4, 2)
    config.model.spatial_attention = (False, True)
    config.model.cross_attention = (False, True)
    config.model.temporal = ("convolution", "convolution")
    config.model.head_dim = 32
    config.model.data_std = 0.05  # of a clip about its upsampled low-resolution clip
    common_machines.refining_on_one_machine(config)
    config.train.steps = 1500
    config.train.learning_rate = 2e-3
    config.train.crop_frames, config.train.crop_height, config.train.crop_width = 3, 48, 48
    config.train.augmentation_min = 6.0
    config.sample.augmentation_snr = 1e4
    config.sample.batch = 4  # bounds memory
    return config


def small():
    """The demo's kinds of layer at sizes that train in seconds."""
    return common_machines.shrunk(demo("small"))
