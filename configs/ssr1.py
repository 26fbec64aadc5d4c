"""The first spatial super-resolution: 24 × 40 to 48 × 80 pixels, 32 frames. Section 2.3.

paper  1.4B parameters. python -m ivideo.main --config=configs/ssr1.py --config.data.dir=DIR --workdir=DIR
       22 GB of float32 parameters, their average and Adam's moments, divided over the devices. 64 chips of v5p
       or v6e take 256 videos per step: docs/tpu.md.
demo   a stage of the small cascade in the package, on the captioned shapes. launch/train_demo.sh FOLDER ssr1 trains it:
       about 55 minutes for 6,000 steps on two cores of an AMD EPYC, 1.7 GB of memory. The weights in the package took
       as many steps, but until step 1,205 the blur was uniform up to 1.5, and the learning rate fell to zero at step
       3,000 and started again. Their loss was not yet in units of data_std.
colab  a stage for one accelerator with 16 GB, which enlarges 16 frames of the colab base.
small  a network of a few thousand parameters, for tests.
"""

from configs import common, common_machines


def get_config(variant: str = "paper"):
    return common.variant(variant, paper=paper, demo=demo, colab=colab, small=small)


def paper():
    """24 × 40 to 48 × 80 pixels. Our widths and depths match the printed parameter count."""
    config = common.stage("ssr1", "paper")
    config.model.channels = (256, 512, 1024, 1024)
    config.model.blocks = (2, 4, 6, 8)
    config.model.strides = (1, 2, 2, 2)
    config.model.spatial_attention = (False, False, True, True)
    config.model.cross_attention = (False, False, True, True)
    config.model.temporal = ("convolution", "convolution", "convolution", "convolution")
    config.sample.mesh = common.mesh(frames=-1)
    return config


def demo(variant="demo"):
    """12 × 20 to 24 × 40 pixels, on the captioned shapes."""
    config = common.stage("ssr1", variant)
    config.model.channels = (64, 128)
    config.model.blocks = (1, 1)
    config.model.strides = (2, 2)
    config.model.spatial_attention = (False, True)
    config.model.cross_attention = (False, True)
    config.model.temporal = ("convolution", "convolution")
    config.model.head_dim = 32
    config.model.data_std = 0.15  # of a clip about its upsampled low-resolution clip
    common_machines.refining_on_one_machine(config)
    config.train.steps = 6000
    config.train.learning_rate = 1e-3
    config.train.crop_frames = 3
    config.train.augmentation_min = 2.0
    config.train.augmentation_blur = 3.0  # the base generates blobs, so shapes have to come from the text
    config.sample.augmentation_snr = 1e4
    return config


def colab():
    """24 × 40 to 48 × 80 pixels, in a network that trains on one chip."""
    config = common.stage("ssr1", "colab")
    config.model.channels = (96, 192, 384)
    config.model.blocks = (2, 2, 3)
    config.model.strides = (1, 2, 2)
    config.model.spatial_attention = (False, False, True)
    config.model.cross_attention = (False, False, True)
    config.model.temporal = ("convolution", "convolution", "convolution")
    common_machines.on_one_chip(config)
    return config


def small():
    """The demo's kinds of layer at sizes that train in seconds."""
    return common_machines.shrunk(demo("small"))
