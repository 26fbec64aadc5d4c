"""The base stage: text to 16 × 24 × 40 at 3 frames per second. Section 2.3.

paper  5.6B parameters. python -m ivideo.main --config=configs/base.py --config.data.dir=DIR --workdir=DIR
       44 GB of float32 parameters and their average (Adafactor's state adds little), divided over the devices.
       64 chips of v5p or v6e take 256 videos per step: docs/tpu.md.
demo   the base of the small cascade in the package, on the captioned shapes. launch/train_demo.sh FOLDER trains it from
       scratch: about two hours for 5,700 steps on two cores of an AMD EPYC (0.8 steps per second). The weights in the
       package took as many steps, but the network changed on the way: until step 2,320 it had no temporal attention at
       its finer level, and until step 2,858 data_std = 1; logsnr_max was 20 throughout. The text encoder's second part
       was trained after them.
colab  a base for one accelerator with 16 GB, on the captioned shapes or on your own clips (config.data).
small  a network of a few thousand parameters, for tests.
"""

from configs import common, common_machines


def get_config(variant: str = "paper"):
    return common.variant(variant, paper=paper, demo=demo, colab=colab, small=small)


def paper():
    """Text to 16 × 24 × 40. The paper prints the parameter count alone; our widths and depths match it."""
    config = common.stage("base", "paper")
    config.model.channels = (960, 1920, 3840)
    config.model.blocks = (3, 4, 3)
    config.model.strides = (1, 2, 2)
    config.model.spatial_attention = (True, True, True)
    config.model.cross_attention = (True, True, True)
    config.model.temporal = ("attention", "attention", "attention")
    config.train.optimizer = "adafactor"
    config.sample.mesh = common.mesh(frames=2, height=2, tensor=-1)
    return config


def demo(variant="demo"):
    """Text to 16 × 12 × 20, on the captioned shapes."""
    config = common.stage("base", variant)
    config.model.channels = (128, 128)
    config.model.blocks = (1, 1)
    config.model.strides = (2, 2)
    config.model.spatial_attention = (False, True)
    config.model.cross_attention = (False, True)
    config.model.temporal = ("attention", "attention")
    config.model.head_dim = 32
    config.model.max_distance = 16
    config.model.frame_positions = True
    config.model.data_std = 0.1  # given its caption, a clip of plain colours varies little
    common_machines.on_one_machine(config)
    config.train.steps = 5700
    config.train.learning_rate = 8e-4
    # 16 frames show one object: together they determine its position at noise levels where a single frame is just noise
    config.diffusion.logsnr_shift = -2.5
    config.diffusion.logsnr_max = 5.0  # sampling up to 20 would double the grain that remains on plain colours
    config.train.sample_every = 1000
    config.sample.steps = 64
    config.sample.weight = 0.0  # guidance makes colours drift over the clip
    return config


def colab():
    """Text to 16 × 24 × 40, in a network that trains on one chip."""
    config = common.stage("base", "colab")
    config.model.channels = (192, 384, 768)
    config.model.blocks = (2, 2, 3)
    config.model.strides = (1, 2, 2)
    config.model.spatial_attention = (False, True, True)
    config.model.cross_attention = (False, True, True)
    config.model.temporal = ("attention", "attention", "attention")
    common_machines.on_one_chip(config)
    config.train.sample_every = 1000
    return config


def small():
    """The demo's kinds of layer at sizes that train in seconds."""
    return common_machines.shrunk(demo("small"))
