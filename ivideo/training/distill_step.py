"""The step of distillation, a pure function. Section 2.7.

Three kinds of student: 'guidance' learns the guided prediction of the original network, with the guidance weight as an
input; 'deterministic', in N steps, learns what its teacher does in 2 N; 'stochastic' learns the jumps over two of its
teacher's N steps that the stochastic sampler makes. Each is a run of its own: a fresh Adam, a step that begins at 0.
The batch, its packed images, dropped texts, crops and noise on the conditioning video are those of training.
"""

import jax
import jax.numpy as jnp
import optax

from ivideo import stages
from ivideo.devices import flops, sharding
from ivideo.diffusion import distill, process
from ivideo.training import step as training
from ivideo.training.step import TrainState

KINDS = tuple(stages.SAMPLERS)
JUMPS = {"deterministic": 1, "stochastic": 2}  # of a student, in steps of 1 / N

# Folded into a sample's key for its guidance weight
_WEIGHT = 3


def make_distill_step(config, mesh=None, kind: str = "deterministic"):
    """The pure step (state, teacher, batch, num_steps) -> (state, metrics), to be jitted with the state donated.

    `config`: the original network's, not a student's. `kind`: one of `KINDS`. `teacher`: its parameters, see
    `teacher_params`; those of 'guidance' are of the original network, the others' of the student before. `num_steps`: N
    of the student, an int32 []: one program serves every number of steps. 'guidance' does not look at it.
    `mesh`: where activations are laid out, see `sharding.constrain`. See `training.step.updated` for updates that are
    left out.
    """
    optimizer = make_optimizer(config)

    def distill_step(state: TrainState, teacher, batch, num_steps):
        with sharding.layout(mesh):
            drawn = training.draws(training.step_key(config, state.step), batch["video"].shape[0])
            loss, grads = training.mean_gradient(
                lambda params, *part: batch_loss(config, kind, params, teacher, *part, num_steps=num_steps),
                state.params,
                (batch, drawn),
                parts=config.train.accumulate,
            )
            rate = learning_rate(config, kind, num_steps, state.step)

            def update(grads, state):
                updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
                params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
                return state.replace(params=params, opt_state=opt_state)

            return training.updated(state, loss, grads, update, rate)

    return distill_step


def batch_loss(config, kind: str, params, teacher, batch, drawn, *, num_steps):
    """The mean loss of a student on a batch: a float32 number. Arguments as of `make_distill_step` and `step.draws`.

    The student is asked for v at a random time, of its own grid but in 'guidance', and for a random guidance weight.
    A sample whose text is left out has the teacher's prediction without text as its target, whatever its weight.
    """
    video, eps, text, mask, given, weights = training.example(config, batch, drawn["key"])
    weight = distill.random_guidance_weight(
        jax.vmap(lambda key: jax.random.fold_in(key, _WEIGHT))(drawn["key"]),
        w_min=config.distill.w_min,
        w_max=config.distill.w_max,
    )
    told = {**given, "guidance_weight": weight}
    original, student = stages.build_model(config), stages.build_model(stages.distilled(config))
    schedule = stages.logsnr_fn(config)
    if kind == "guidance":
        logsnr = schedule(drawn["time"])
        z = process.add_noise(video, eps, logsnr)
        with_text = stages.denoiser(original, teacher, text, mask, **given)
        without = stages.denoiser(original, teacher, text, jnp.zeros_like(mask), **given)
        target = distill.guided_target(with_text, without, z, logsnr, weight)
    else:
        i = distill.random_grid_point(drawn["time"], num_steps=num_steps)
        logsnr = schedule(distill.student_time(i, num_steps=num_steps))
        z = process.add_noise(video, eps, logsnr)
        target = distill.two_step_target(
            stages.denoiser(student, teacher, text, mask, **told),
            z, i=i, num_steps=num_steps, jump=JUMPS[kind], logsnr_fn=schedule,
        )  # fmt: skip
    v = stages.denoiser(student, params, text, mask, **told)(z, logsnr)
    loss = process.v_loss(v, target, logsnr, kind=config.distill.loss, weights=weights)
    return training.mean_loss(config, loss, kind=config.distill.loss)


def updates(config, kind: str, num_steps):
    """How many updates a phase has, for a student of `num_steps`, a number or an array []."""
    if kind == "guidance":
        return config.distill.guidance_updates
    late, other = config.distill.late_round_updates, config.distill.round_updates
    if isinstance(num_steps, int):
        return late if num_steps <= 2 else other
    return jnp.where(num_steps <= 2, late, other)


def learning_rate(config, kind: str, num_steps, step):
    """The rate of a phase's step, from 0: it falls linearly to 0 at the phase's last update."""
    return config.distill.learning_rate * jnp.maximum(1 - step / updates(config, kind, num_steps), 0.0)


def make_optimizer(config) -> optax.GradientTransformation:
    """Adam behind a clip of the gradient's global norm. Its updates are still to be multiplied by the learning rate."""
    return optax.chain(optax.clip_by_global_norm(config.distill.clip), optax.scale_by_adam())


def teacher_params(config, params):
    """A teacher's parameters in the type that they are held in, `config.distill.teacher_dtype`."""
    return jax.tree.map(lambda p: p.astype(config.distill.teacher_dtype), params)


def init_state(config, params) -> TrainState:
    """A phase's state before its first step: of the teacher's parameters, float32.

    An original network's are given the layers that embed the guidance weight. They end in zeros, so the student begins
    as its teacher. No array is shared with `params`: the state can be donated.
    """
    if "guidance_embedding" not in params:
        fresh = stages.init_params(stages.distilled(config), jax.random.key(config.seed))
        params = {**params, "guidance_embedding": fresh["guidance_embedding"]}
    params = jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)
    step, skipped = (jnp.zeros((), jnp.int32) for _ in range(2))
    return TrainState(step, params, {}, make_optimizer(config).init(params), skipped)


def state_shapes(config) -> TrainState:
    """Shapes of a phase's state; nothing is allocated."""
    return jax.eval_shape(lambda params: init_state(config, params), stages.param_shapes(config))


def teacher_shapes(config, kind: str):
    """Shapes of the parameters that the step takes as the teacher's."""
    of = config if kind == "guidance" else stages.distilled(config)
    return jax.eval_shape(lambda params: teacher_params(config, params), stages.param_shapes(of))


def model_flops(config, kind: str) -> int:
    """The model's FLOPs of a step over all devices, without those that rematerialisation does again."""
    plain = config.copy_and_resolve_references()
    plain.model.remat = "none"
    args = (state_shapes(plain), teacher_shapes(plain, kind), training.batch_shapes(plain))
    return flops.count(make_distill_step(plain, kind=kind), *args, jax.ShapeDtypeStruct((), jnp.int32))
