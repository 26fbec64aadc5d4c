"""The third spatial super-resolution: 192 × 320 to 768 × 1280 pixels, 128 frames. Section 2.3.

paper  340M parameters. python -m ivideo.main --config=configs/ssr3.py --config.data.dir=DIR --workdir=DIR
       5.4 GB of float32 parameters, their average and Adam's moments, divided over the devices. 64 chips of v5p
       or v6e take 256 videos per step: docs/tpu.md.
demo   a stage of the small cascade in the package, on the captioned shapes. launch/train_demo.sh FOLDER ssr3 trains it:
       15 minutes for 1,000 steps on two cores of an AMD EPYC, 1.7 GB of memory.
small  a network of a few thousand parameters, for tests.
"""

from configs import common, common_machines


def get_config(variant: str = "paper"):
    return common.variant(variant, paper=paper, demo=demo, small=small)


def paper():
    """192 × 320 to 768 × 1280 pixels. Our widths and depths match the printed count.

    No layer depends on the size of the frame, so it trains on crops and samples whole frames. As Imagen's stage from
    256 to 1024 pixels (arXiv 2205.11487, Section 2.5), it has no self-attention but keeps attention to the text.
    """
    config = common.stage("ssr3", "paper")
    config.model.channels = (128, 256, 512, 1024)
    config.model.blocks = (2, 2, 3, 3)
    config.model.strides = (2, 2, 2, 2)
    config.model.spatial_attention = (False, False, False, False)
    config.model.cross_attention = (False, False, False, True)
    config.model.temporal = ("convolution", "convolution", "convolution", "convolution")
    config.train.crop_frames = 16  # short clips; the paper prints no length
    config.train.crop_height, config.train.crop_width = 256, 256
    config.sample.mesh = common.mesh(frames=4, height=-1)
    config.sample.batch = 1  # bounds memory
    return config


def demo(variant="demo"):
    """96 × 160 to 192 × 320 pixels, on the captioned shapes; trained on crops."""
    config = common.stage("ssr3", variant)
    config.model.channels = (32, 64)
    config.model.blocks = (1, 1)
    config.model.strides = (2, 2)
    config.model.spatial_attention = (False, False)
    config.model.cross_attention = (False, False)
    config.model.temporal = ("convolution", "convolution")
    config.model.data_std = 0.03  # of a clip about its upsampled low-resolution clip
    common_machines.refining_on_one_machine(config)
    config.train.steps = 1000
    config.train.learning_rate = 2e-3
    config.train.crop_frames, config.train.crop_height, config.train.crop_width = 3, 64, 64
    config.train.augmentation_min = 6.0
    config.sample.augmentation_snr = 1e4
    config.sample.batch = 1  # bounds memory
    return config


def small():
    """The demo's kinds of layer at sizes that train in seconds."""
    return common_machines.shrunk(demo("small"))
