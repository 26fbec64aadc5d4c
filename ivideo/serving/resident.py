"""A cascade that stays in memory: weights are read and programs compiled once, for one request after another."""

import collections
import contextlib
import itertools
import threading
from collections.abc import Callable, Sequence

import numpy as np

from ivideo import recipe
from ivideo.devices import sharding
from ivideo.sampling import cascade
from ivideo.text import load_encoder
from ivideo.training import trained

MAX_PROGRAMS = 16  # programs that are kept; beyond, the one that was not used for longest is dropped
COMPILING, SAMPLING = "compiling", "sampling"


class ResidentCascade:
    """The stages from `from_stage` to `to_stage` of a config, as `cascade.select` chooses them.

    `configs`: theirs, in order. `identities`: per stage, which weights it has (`trained.check`). `guidance_range`: the
    least and the largest guidance weight of the first stage. Weights are read when a stage is first used, and stay on
    the devices. UserError as from `trained.find` and `trained.check`.
    """

    def __init__(self, config, *, workdir=None, weights_path=None, from_stage=None, to_stage=None):
        self.config, self.configs = config, cascade.select(config, from_stage, to_stage)
        self._sources = trained.find(self.configs, workdir=workdir, weights=weights_path)
        self.identities = {stage.stage: trained.check(stage, self._sources[stage.stage]) for stage in self.configs}
        first = self.configs[0]
        self.guidance_range = recipe.guidance_range(first, trained.saved_config(first, self._sources[first.stage]))
        self._lock = threading.Lock()  # one request uses the devices at a time
        self._params, self._encoders, self._seconds, self._should_stop = {}, {}, {}, None
        self._programs = collections.OrderedDict()

    def sample(
        self,
        stage,
        prompts: Sequence[str],
        *,
        seeds: Sequence[tuple[int, ...]],
        size: int,
        low_res: np.ndarray | None = None,
        on_step: Callable[[str, int], None] = lambda phase, step: None,
    ) -> np.ndarray:
        """Samples one video per prompt, [N, T, H, W, 3] in [-1, 1], in a batch of `size`: N or more.

        `stage`: the config of one of the stages, of which only values in `config.sample` may differ from `configs`.
        `seeds` and `low_res`: as in `cascade.sample_stage`. `on_step` is called before compiling, and before every
        sampling step with its number; an error that it raises ends the work. FloatingPointError if a video has a
        `cascade.defect`.
        """
        with self._lock:
            on_step(COMPILING, 0)
            program = self._program(stage, size)
            params, texts = self._placed(stage, program), self._texts(stage, prompts)
            rows = list(range(len(prompts)))
            with self._reporting(on_step):
                ((_, videos),) = program.batches(params, [rows], texts=texts, seeds=seeds, low_res=low_res)
            self._seconds[_key(stage, size)] = program.seconds
        for prompt, video in zip(prompts, videos, strict=True):
            cascade.check_video(stage, prompt, video)
        return videos

    @contextlib.contextmanager
    def _reporting(self, on_step):
        """Inside the block, programs report their steps to `on_step`, and stop where it raises an error."""
        steps, errors = itertools.count(1), []

        def should_stop():
            if not errors:
                try:
                    on_step(SAMPLING, next(steps))
                except BaseException as e:
                    errors.append(e)
            return bool(errors)

        self._should_stop = should_stop
        try:
            yield
        finally:
            self._should_stop = None
        if errors:
            raise errors[0]

    def seconds(self, stage, size: int) -> float | None:
        """What the last batch of `size` videos of this stage took, without compilation; None before the first."""
        return self._seconds.get(_key(stage, size))

    def _program(self, stage, size):
        key = _key(stage, size)
        if key not in self._programs:
            self._programs[key] = cascade.StageSampler(stage, size, should_stop=lambda: self._should_stop())
            while len(self._programs) > MAX_PROGRAMS:
                self._programs.popitem(last=False)
        self._programs.move_to_end(key)
        return self._programs[key]

    def _placed(self, stage, program):
        """The stage's parameters on the program's mesh."""
        key = stage.stage, program.mesh
        if key not in self._params:
            name = stage.stage
            params = trained.load(stage, self._sources[name], identity=self.identities[name])
            self._params[key] = program.place(params)
        return self._params[key]

    def _texts(self, stage, prompts):
        key = repr(stage.text)
        if key not in self._encoders:
            self._encoders[key] = load_encoder(stage.text, mesh=sharding.make_mesh({"fsdp": -1}))
        return cascade.embed_prompts(stage, prompts, batch=len(prompts), encoder=self._encoders[key])


def _key(stage, size: int) -> tuple:
    return stage.stage, size, repr(stage.sample)
