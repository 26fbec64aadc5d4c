"""How well a student agrees with its teacher: both sample the same noise, and the student takes half of the steps."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from ivideo import stages
from ivideo.devices import sharding
from ivideo.diffusion import guidance, samplers
from ivideo.training import distill_step, loop
from ivideo.training.step import conditioning_inputs

CLIPS = 4  # that are compared; more where the mesh splits a batch into more parts


class Agreement:
    """Compares samples of a student and of its teacher: always the same clips, texts, noise and guidance weights.

    Both are sampled by DDIM without thresholds. The guidance weights go from `config.distill.w_min` to `w_max`, one per
    clip. A super-resolution stage is given the first clips of the data as in training, noise included. All processes
    make and use one together.
    """

    def __init__(self, config, context: loop.RunContext):
        """`config`: of the original network."""
        self._config, self._mesh = config, context.mesh
        # By whether they are of the original network
        configs = {True: config, False: stages.distilled(config)}
        self._networks = {original: stages.build_model(of) for original, of in configs.items()}
        # To the type that a teacher is held in: the student of a phase is the next one's teacher
        self._casts = {
            original: jax.jit(
                lambda params: distill_step.teacher_params(config, params),
                out_shardings=sharding.param_shardings(self._mesh, stages.param_shapes(of)),
            )
            for original, of in configs.items()
        }
        self._error = jax.jit(lambda a, b: jnp.square(a - b).mean(), out_shardings=sharding.replicated(self._mesh))
        self._programs = {}
        reading = config.copy_and_resolve_references()
        reading.data.workers = reading.data.num_images = 0
        batch = next(loop.make_process_data(reading, context.encoder, context.mesh))
        parts = sharding.batch_parts(self._mesh)
        self._count = min(-(-CLIPS // parts) * parts, config.train.batch_size)

        def first(batch):
            return {name: batch[name][: self._count] for name in ("video", "text", "token_mask")}

        batch = context.prepare_batch(sharding.to_devices(batch, self._mesh))
        where = sharding.batch_shardings(self._mesh, jax.eval_shape(first, batch))
        self._batch = jax.jit(first, out_shardings=where)(batch)

    def measure(self, student, teacher, *, steps: int, teacher_steps: int, original: bool) -> dict[str, float]:
        """Compares a student of `steps` steps with its teacher of `teacher_steps`, both given as parameters.

        `original`: whether the teacher is the original network, which is guided by two evaluations. Returns
        `agreement`, the PSNR of the student's clips against the teacher's in dB, and the seconds that they take per
        sample, compiling not counted: `seconds_per_sample` and `teacher_seconds_per_sample`.
        """
        wanted, teacher_seconds = self._sample(teacher, teacher_steps, original)
        made, seconds = self._sample(student, steps, False)
        agreement = 10 * np.log10(4 / max(float(self._error(made, wanted)), 1e-12))  # 126 dB for equal clips
        return {
            "agreement": float(agreement),
            "seconds_per_sample": seconds / self._count,
            "teacher_seconds_per_sample": teacher_seconds / self._count,
        }

    def _sample(self, params, steps, original):
        params = self._casts[original](params)
        if (steps, original) not in self._programs:
            program = jax.jit(lambda params, batch: self._clips(params, batch, steps, original))
            self._programs[steps, original] = program.lower(params, self._batch).compile()
        began = time.perf_counter()
        clips = jax.block_until_ready(self._programs[steps, original](params, self._batch))
        return clips, time.perf_counter() - began

    def _clips(self, params, batch, steps, original):
        config, network, (count, *shape) = self._config, self._networks[original], batch["video"].shape
        with sharding.layout(self._mesh):
            keys = jax.random.split(jax.random.key(config.seed), 2 * count)
            weight = jnp.linspace(config.distill.w_min, config.distill.w_max, count)
            given = conditioning_inputs(config, batch, keys[count:]) if config.cond.frames else {}
            text, mask = batch["text"], batch["token_mask"]
            if original:
                with_text = stages.denoiser(network, params, text, mask, **given)
                without = stages.denoiser(network, params, text, jnp.zeros_like(mask), **given)
                v_fn = guidance.classifier_free(with_text, without, weight)
            else:
                v_fn = stages.denoiser(network, params, text, mask, guidance_weight=weight, **given)
            noise = sharding.constrain(samplers.initial_noise(keys[:count], tuple(shape)), *sharding.VIDEO)
            clips = samplers.ddim(v_fn, noise, num_steps=steps, logsnr_fn=stages.logsnr_fn(config))
            return jnp.clip(clips, -1, 1)
