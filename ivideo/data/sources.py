"""Random-access sources of captioned clips: drawn on the fly (shapes), or read from a set prepared with TFDS.

A source has `__len__`, `__getitem__(i) -> {"video": float32 [T,H,W,3] in [-1, 1], "caption": str}` and
`image(i, rng) -> {"image": float32 [H,W,3], "caption": str}`, one frame of clip i that `rng` chooses. Both depend on
nothing but their arguments, so that a run that is stopped and resumed sees the same data.
numpy only: data workers import this file.
"""

from collections.abc import Sequence

import numpy as np

from ivideo.data import shapes


class ShapesSource:
    """Clips of the captioned-shapes world, rendered when asked for; clip i is the same in every run.

    `attributes`: what to draw, e.g. `shapes.TRAIN`; clip i has attributes[i % len(attributes)], so every caption comes
    equally often where `num_clips` is a multiple of their number (and to within one clip elsewhere).
    `frames`, `height`, `width`: the size of every clip. ValueError where a number is not positive.
    """

    def __init__(
        self,
        attributes: Sequence[shapes.Attributes] = shapes.TRAIN,
        *,
        num_clips: int,
        seed: int,
        frames: int,
        height: int,
        width: int,
    ):
        if not attributes:
            raise ValueError("attributes is empty, expected one or more: pass e.g. shapes.TRAIN.")
        for name, value in (("num_clips", num_clips), ("frames", frames), ("height", height), ("width", width)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more: pass a positive number.")
        if seed < 0:
            raise ValueError(f"seed is {seed}, expected 0 or more: pass another seed.")
        self.attributes = tuple(shapes.check_attributes(a) for a in attributes)
        self.num_clips, self.seed = num_clips, seed
        self.frames, self.height, self.width = frames, height, width

    def __len__(self) -> int:
        return self.num_clips

    def _clip(self, index: int) -> tuple[shapes.Attributes, int]:
        if not 0 <= index < self.num_clips:
            raise IndexError(f"clip {index} of a source of {self.num_clips}: ask for 0 to {self.num_clips - 1}.")
        # Sources of different seeds share no clip, as long as they have under 2^32 clips each.
        return self.attributes[index % len(self.attributes)], (self.seed << 32) + int(index)

    def __getitem__(self, index: int) -> dict:
        attrs, seed = self._clip(index)
        video = shapes.render(attrs, seed, frames=self.frames, height=self.height, width=self.width)
        return {"video": video, "caption": shapes.caption(attrs)}

    def image(self, index: int, rng: np.random.Generator) -> dict:
        attrs, seed = self._clip(index)
        time = shapes.frame_times(self.frames)[[rng.integers(self.frames)]]
        image = shapes.render_at(attrs, seed, time, height=self.height, width=self.width)[0]
        return {"image": image, "caption": shapes.caption(attrs)}
