"""A config's distilled students: the one switch, what follows from it, and which weights go with it."""

import json

import jax
import jax.numpy as jnp
import light_network
import numpy as np
import pytest

from configs import base, cascade, ssr2
from ivideo import checks, config_files, recipe, stages
from ivideo.errors import UserError


def saved(config):
    """A config as it comes back from beside its weights."""
    return json.loads(json.dumps(config.to_dict()))


def test_small_phases_of_the_paper():
    assert stages.phases(base.get_config()) == ["guidance", "128", "64", "32", "16", "8", "8_stochastic"]
    assert stages.phases(ssr2.get_config()) == ["guidance", "64", "32", "16", "8", "8_stochastic"]
    config = ssr2.get_config()
    config.distill.end_steps, config.distill.stochastic = 32, False
    assert stages.phases(config) == ["guidance", "64", "32"]
    config.distill.end_steps = 7
    with pytest.raises(ValueError, match="Halving 128 steps does not lead to 7"):
        stages.phases(config)


@pytest.mark.parametrize(
    ("phase", "kind", "sampler", "steps"),
    [
        ("guidance", "guidance", "ddim", 256),
        ("128", "deterministic", "ddim", 128),
        ("8", "deterministic", "ddim", 8),
        ("8_stochastic", "stochastic", "distilled", 8),
    ],
)
def test_small_one_switch_sets_all_that_a_student_differs_in(phase, kind, sampler, steps):
    config = base.get_config()
    student = stages.distilled(config, phase)
    checks.check(student)
    assert stages.student(config, phase) == (kind, steps)
    different = {key: here for key, _, here in recipe.differences(saved(config), student)}
    wanted = {"phase": phase, "model.guidance_input": True, "sample.sampler": sampler, "sample.steps": steps}
    assert different == {key: value for key, value in wanted.items() if (key, value) != ("sample.steps", 256)}
    assert config.phase == ""


@pytest.mark.parametrize("phase", ["0", "08", "8_random", "guided", "guidance_stochastic"])
def test_small_unknown_phases_are_named(phase):
    with pytest.raises(UserError, match=f"phase '{phase}' of distillation is unknown: expected guidance"):
        stages.distilled(base.get_config(), phase)
    with pytest.raises(UserError, match=f"--config=configs/base.py:demo_distilled_{phase}: phase '{phase}'"):
        config_files.load_config(f"configs/base.py:demo_distilled_{phase}")


def test_small_variants_of_the_command_line():
    for variant, phase, of in (
        ("distilled", "8_stochastic", "paper"),
        ("demo_distilled", "8_stochastic", "demo"),
        ("small_distilled_4", "4", "small"),
        ("demo_distilled_8_stochastic", "8_stochastic", "demo"),
        ("demo_distilled_guidance", "guidance", "demo"),
    ):
        config = config_files.load_config(f"configs/base.py:{variant}")
        checks.check(config)
        assert config == stages.distilled(base.get_config(of), phase)
        with pytest.raises(AttributeError):
            config.train.batchsize = 1  # still locked
    with pytest.raises(UserError, match="variant 'big' is unknown"):
        config_files.load_config("configs/base.py:big_distilled")


def test_small_the_cascade_takes_any_mix():
    whole = config_files.load_config("configs/cascade.py:paper_distilled")
    mixed = config_files.load_config("configs/cascade.py:demo_distilled=ssr1,tsr1")
    for config in (whole, mixed):
        checks.check(config)
    assert {stage.phase for stage in whole.stages.values()} == {"8_stochastic"}
    assert {name for name, stage in mixed.stages.items() if stage.phase} == {"ssr1", "tsr1"}
    assert mixed.stages.base == cascade.get_config("demo").stages.base
    with pytest.raises(UserError, match="'ssr9' is no stage of it, expected some of base, ssr1"):
        config_files.load_config("configs/cascade.py:demo_distilled=ssr1,ssr9")


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        ("", "8_stochastic", "RUN is of an original network, and the config of phase 8_stochastic .*FILE:demo, or"),
        (
            "8",
            "",
            "RUN is of phase 8 of distillation, and the config of an original network: .*FILE:demo_distilled_8,",
        ),
        ("8", "8_stochastic", "RUN is of phase 8 .* config of phase 8_stochastic .*FILE:demo_distilled_8, or"),
        ("16", "8", "RUN is of phase 16 .* of phase 8 of distillation: .*FILE:demo_distilled_16, or other weights"),
    ],
)
def test_small_weights_of_another_phase_are_refused(there, here, said):
    original = base.get_config("demo")
    configs = {phase: stages.distilled(original, phase) if phase else original for phase in (there, here)}
    for phase in (there, here):
        recipe.check_network("RUN", saved(configs[phase]), configs[phase])
    with pytest.raises(UserError, match=said):
        recipe.check_network("RUN", saved(configs[there]), configs[here])


def test_small_weights_from_before_there_were_phases_are_of_originals():
    config = base.get_config("demo")
    found = saved(config)
    del found["phase"], found["distill"]
    recipe.check_network("RUN", found, config)
    with pytest.raises(UserError, match="RUN is of an original network"):
        recipe.check_network("RUN", found, stages.distilled(config))


@pytest.mark.parametrize("guidance", ["constant", "oscillating"])
def test_small_a_student_is_told_the_weight_and_evaluated_once(guidance):
    config = stages.distilled(base.get_config(), "8_stochastic")
    config.sample.guidance = guidance
    calls = []

    class Network:
        def apply(self, variables, z, logsnr, text, mask, *, guidance_weight):
            calls.append(mask)
            return jnp.broadcast_to(guidance_weight[:, None], z.shape)

    mask = jnp.ones((8, 4), bool)
    v_fn = stages.guided_denoiser(config, Network(), {}, None, mask)
    logsnr = stages.logsnr_fn(config)(1 - jnp.arange(8) / 8)
    told = np.asarray(v_fn(jnp.zeros((8, 1)), logsnr))[:, 0]
    assert len(calls) == 1 and bool(calls[0].all())
    np.testing.assert_array_equal(told, [6.0] * 8 if guidance == "constant" else [15, 1, 15, 1, 15, 1, 15, 1])


def test_a_new_guidance_embedding_changes_nothing():
    """Its last layer is zero, so v is the same bit for bit whatever the weight."""
    config = base.get_config("small")
    config.update_from_flattened_dict(light_network.OPTIONS)
    student = stages.distilled(config)
    shapes, rng = stages.param_shapes(config), np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(0.2 * rng.normal(size=s.shape), jnp.float32), shapes)
    fresh = jax.jit(lambda key: stages.init_params(student, key)["guidance_embedding"])(jax.random.key(0))
    assert float(jnp.abs(fresh["dense_0"]["kernel"]).max()) > 0
    (z, _, text, mask), _ = stages.model_inputs(config, 2)
    args = (jax.random.normal(jax.random.key(1), z.shape), jnp.array([-2.0, 3.0]), jnp.ones(text.shape))
    args = (*args, jnp.ones(mask.shape, bool))
    v = jax.jit(stages.build_model(config).apply)({"params": params}, *args)
    told = {**params, "guidance_embedding": fresh}
    ours = jax.jit(stages.build_model(student).apply)({"params": told}, *args, guidance_weight=jnp.array([0.0, 4.0]))
    assert float(jnp.abs(v).max()) > 0.1
    np.testing.assert_array_equal(ours, v)
