"""The network of all stages: `unet.VideoUNet`, its blocks and its attention. Sections 2.2 and 2.3."""
