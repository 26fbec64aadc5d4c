"""Compiling for TPU slices without a TPU. Tests that need libtpu are skipped without it."""

import ast
import functools
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from configs import base, ssr1, tsr2
from ivideo import stages
from ivideo.devices import sharding
from ivideo.devices.chips import CHIPS, of_device, slice_of
from ivideo.errors import UserError
from ivideo.planning import compile, describe
from ivideo.training import step

ROOT = pathlib.Path(__file__).parent.parent
libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="TPU's compiler: pip install 'jax[tpu]'")


@pytest.mark.parametrize("topology", ["v9:4x4", "v5e", "v5e:4", "v5e:axb", "v5p:4x4x4x4", "v5e:0x4", "v5e:04x4", ""])
def test_small_unknown_slices_are_named(topology):
    said = f"--topology='{topology}': expected a chip of v4, v5e, v5p, v6e, tpu7x and its grid"
    with pytest.raises(UserError, match=said):
        compile.topology_devices(topology)


@pytest.mark.parametrize(
    ("topology", "said"),
    [
        ("v5e:4x4x4", "the chips of v5e are connected in 2 dimensions; choose one of v5e:1x1, v5e:2x2, .*, v5e:16x16$"),
        ("v6e:2x2x1", "the chips of v6e are connected in 2 dimensions"),
        ("v6e:32x32", "Google offers no such slice of v6e; choose one of v6e:1x1, .*, v6e:16x16$"),
        ("v5e:3x3", "Google offers no such slice of v5e"),
        ("v5e:4x2", "Google offers no such slice of v5e"),
        ("v5p:4x4", "the chips of v5p are connected in 3 dimensions; choose one of v5p:2x2x1, .*, or multiples of 4"),
        ("v4:1x1x1", "Google offers no such slice of v4"),
        ("v5p:6x6x6", "Google offers no such slice of v5p; .* up to 6,144 chips, such as v5p:4x4x8"),
        ("v5p:8x4x4", "Google offers no such slice of v5p; give the sizes in ascending order: v5p:4x4x8$"),
        ("v4:16x16x20", "Google offers no such slice of v4; .* up to 4,096 chips"),
        ("tpu7x:2x2", "the chips of tpu7x are connected in 3 dimensions"),
    ],
)
def test_small_slices_that_are_not_offered_are_refused_before_the_compiler_sees_them(topology, said):
    with pytest.raises(UserError, match=f"--topology={topology}: {said}"):
        compile.topology_devices(topology)


@pytest.mark.parametrize(
    ("topology", "chip", "grid"),
    [
        ("v5e:1x1", "v5e", (1, 1)),
        ("v6e:16x16", "v6e", (16, 16)),
        ("v4:2x2x1", "v4", (2, 2, 1)),
        ("v5p:16x16x24", "v5p", (16, 16, 24)),
        ("tpu7x:1x1x1", "tpu7x", (1, 1, 1)),
        ("tpu7x:4x4x4", "tpu7x", (4, 4, 4)),
        ("tpu7x:16x24x24", "tpu7x", (16, 24, 24)),
    ],
)
def test_small_slices_that_are_offered(topology, chip, grid):
    assert slice_of(topology) == (chip, grid)


def test_small_a_device_of_two_a_chip_has_half_of_it():
    assert CHIPS["v5p"].device() == CHIPS["v5p"]
    half = CHIPS["tpu7x"].device()
    assert (half.flops, half.bandwidth, half.memory, half.devices) == (1153.5e12, 3.685e12, 96 * 2**30, 1)


def test_sampling_is_of_one_evaluation_of_the_distilled_network():
    config = compile.one_step(base.get_config())
    assert (config.sample.sampler, config.sample.steps, config.model.guidance_input) == ("distilled", 1, True)
    found = compile.count_flops(base.get_config(), "sample")
    assert found == describe.forward_flops(config)
    # the guidance weight's embedding, two layers of 960 to 3840, beside what the network always has
    extra = 2 * (960 * 3840 + 3840 * 3840)
    assert found - describe.forward_flops(base.get_config()) == extra
    params, *_, low = compile.sampling_shapes(compile.one_step(tsr2.get_config()))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jax.numpy.dtype("bfloat16")}
    assert low.shape == (1, 32, 192, 320, 3)


def test_models_flops_of_a_step_are_three_forward_passes():
    """A backward pass costs two forward ones: each product has two gradients, but for the first layers' inputs."""
    config = ssr1.get_config()
    config.train.batch_size = 256
    config.data.num_images = 0
    forward = 256 * describe.forward_flops(config)
    plain = step.model_flops(config)
    assert 2.98 < plain / forward < 3.0
    config.model.remat = "none"
    assert step.model_flops(config) == plain


@pytest.mark.parametrize("what", ["distill-guidance", "distill-round"])
def test_a_step_of_distillation_is_five_forward_passes(what):
    """Two of the teacher, with and without text or at two times, and three of the student as in training."""
    config = ssr1.get_config()
    config.train.batch_size = 256
    config.data.num_images = 0
    forward = 256 * describe.forward_flops(config)
    assert 4.98 < compile.count_flops(config, what) / forward < 5.01


def test_small_programs_of_distillation_keep_the_states_layout(monkeypatch):
    """The teacher is laid out as the student is, in its own type, and is not donated."""
    monkeypatch.setattr(sharding, "MIN_SHARDED", 1)  # else nothing of a network this small is split
    config = tsr_small()
    config.distill.teacher_dtype = "bfloat16"
    mesh = sharding.make_mesh({"fsdp": 8})
    for what in compile.DISTILL:
        _, (state, teacher, _, steps), (where, _), donated = compile.PROGRAMS[what](config, mesh)
        assert donated == (0,) and steps.shape == () and state.ema == {}
        jax.tree.map(lambda leaf, place: leaf.sharding == place or pytest.fail(f"{leaf} {place}"), state, where)
        assert ("guidance_embedding" in teacher) == (what == "distill-round")
        for path, leaf in jax.tree.leaves_with_path(teacher):
            student = functools.reduce(lambda node, key: node[key.key], path, state.params)
            assert leaf.dtype == "bfloat16" and leaf.sharding == student.sharding


def test_small_a_student_is_no_config_to_distil_from():
    with pytest.raises(UserError, match="choose the variant without _distilled"):
        compile.check_what(stages.distilled(base.get_config("small")), "distill-round")


def test_programs_run_as_they_are_compiled():
    """On this machine's devices, at the smallest size: the same programs, their results laid out as asked."""
    config = tsr_small()
    mesh = sharding.make_mesh({"fsdp": 2, "frames": 2, "height": 2})
    for program in (compile.training_program, compile.sampling_program):
        fn, args, where, donated = program(config, mesh)
        compiled = jax.jit(fn, donate_argnums=donated, out_shardings=where).lower(*args).compile()
        made = compiled.output_shardings
        if program is compile.training_program:
            made, where = (dict(enumerate(jax.tree.leaves(t))) for t in (made[0], where[0]))
            same = [made[i].is_fully_replicated == where[i].is_fully_replicated for i in where]
            assert all(same)
        else:
            assert made.is_equivalent_to(where, 5) and not made.is_fully_replicated
        assert compiled.memory_analysis().argument_size_in_bytes > 0
        assert "collective-permute" in compiled.as_text()


def tsr_small():
    config = tsr2.get_config("small")
    config.train.batch_size = 8
    return config


class Refused(Exception):
    pass


@pytest.mark.parametrize(
    ("what", "change"), [("train", "config.train.accumulate"), ("sample", "config.sample.mesh.frames and height")]
)
def test_small_what_does_not_fit_says_what_to_change(what, change):
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40.21G of 31.25G hbm."
    found = compile._does_not_fit(Refused(message), base.get_config(), "v6e:4x4", what)
    assert isinstance(found, UserError)
    assert f"base:paper to {what} does not fit v6e:4x4: 40.21G of 31.25G per device" in str(found)
    assert change in str(found)
    other = Refused("INTERNAL: something else")
    assert compile._does_not_fit(other, base.get_config(), "v6e:4x4", what) is other


def ivideo(*arguments):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TPU_SKIP_MDS_QUERY": "1"}
    command = [sys.executable, "-m", "ivideo.main", "--mode=compile", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


@libtpu
def test_small_table_and_json(tmp_path):
    """A small stage for a real slice: every number is there, and they agree with one another."""
    out = tmp_path / "found.json"
    arguments = ["--config=configs/ssr1.py:small", "--topology=v5e:2x2", "--what=train", f"--out={out}"]
    done = ivideo(*arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ssr1:small, one step of mode train on v5e:2x2 (4 chips: data 4), batch 8" in done.stdout
    found = json.loads(out.read_text())
    chip = CHIPS["v5e"]
    assert (found["chips"], found["devices"]) == (4, 4)
    assert found["parameters"] == describe.facts(ssr1.get_config("small"))["parameters"]
    assert found["roofline_seconds"] == max(found["flops"] / chip.flops, found["bytes"] / chip.bandwidth)
    assert found["mfu_bound"] == pytest.approx(found["model_flops"] / (4 * chip.flops * found["roofline_seconds"]))
    memory = found["memory"]
    assert memory["arguments"] < memory["peak"] < memory["capacity"] == 16 * 2**30
    assert any(name.startswith("all-reduce") for name in found["collectives"])
    again = ivideo(*arguments)
    assert again.returncode == 2 and "exists" in again.stderr


@libtpu
def test_small_both_steps_of_distillation_compile(tmp_path):
    out = tmp_path / "found.json"
    done = ivideo("--config=configs/base.py:small", "--topology=v5e:2x2", "--what=distill", f"--out={out}")
    assert done.returncode == 0, done.stderr[-2000:]
    for what in ("distill-guidance", "distill-round"):
        assert f"base:small, a step to {what} on v5e:2x2 (4 chips: data 4), batch 8" in done.stdout
    found = json.loads(out.read_text())
    assert {name: row["what"] for name, row in found.items()} == {name: name for name in compile.DISTILL}
    assert found["distill-round"]["memory"]["peak"] < 16 * 2**30


@libtpu
@pytest.mark.parametrize(
    ("topology", "devices", "kind"),
    [
        ("v5e:1x1", 1, "TPU v5 lite"),
        ("v6e:1x1", 1, "TPU v6 lite"),
        ("v4:2x2x1", 4, "TPU v4"),  # two cores of a chip are one device there
        ("v5p:2x2x1", 4, "TPU v5"),
        ("tpu7x:1x1x1", 2, "TPU7x"),
        ("tpu7x:2x2x1", 8, "TPU7x"),
        ("tpu7x:4x4x4", 128, "TPU7x"),
    ],
)
def test_small_slices_have_the_devices_that_jax_finds_there(topology, devices, kind):
    found, chip = compile.topology_devices(topology)
    assert (len(found), found[0].device_kind) == (devices, kind)
    assert of_device(found[0]) == CHIPS[chip].device()
    assert devices == math.prod(slice_of(topology)[1]) * CHIPS[chip].devices


@libtpu
@pytest.mark.parametrize(
    ("topology", "said"),
    [
        ("v5e:1x1", "on v5e:1x1 (1 chip: one device), batch 8"),
        ("tpu7x:2x2x1", "on tpu7x:2x2x1 (4 chips, 8 devices: data 8), batch 8"),
    ],
)
def test_small_a_single_chip_and_chips_of_two_devices_compile(topology, said, tmp_path):
    done = ivideo("--config=configs/base.py:small", f"--topology={topology}", f"--out={tmp_path}/found.json")
    assert done.returncode == 0, done.stderr[-2000:]
    assert said in done.stdout
    found, peak = json.loads((tmp_path / "found.json").read_text()), CHIPS[topology.split(":")[0]].device()
    assert found["devices"] == found["chips"] * CHIPS[found["chip"]].devices
    assert found["memory"]["capacity"] == peak.memory and found["peaks"]["flops_per_second"] == peak.flops
    assert found["mfu_bound"] == pytest.approx(
        found["model_flops"] / (found["devices"] * peak.flops * found["roofline_seconds"])
    )


@libtpu
@pytest.mark.parametrize(
    ("topology", "mesh", "readers"),
    [
        ("v5p:4x4x4", {"fsdp": -1}, 16),
        ("v6e:8x8", {"fsdp": -1}, 16),
        ("v5e:16x16", {"fsdp": -1}, 64),
        ("v5e:16x16", {"fsdp": -1, "height": 4}, 32),
        ("v6e:4x4", {"fsdp": 2, "frames": -1}, 2),
        ("tpu7x:4x4x4", {"fsdp": -1}, 16),
    ],
)
def test_small_hosts_of_a_slice_read_parts_of_the_batch(topology, mesh, readers):
    """Where a mesh follows the chips' network, a host's parts are not in a row."""
    mesh = sharding.make_mesh(mesh, compile.topology_devices(topology)[0])
    _, found = sharding.process_parts(mesh)
    assert len(found) == readers
    assert sorted(part for parts in found for part in parts) == list(range(sharding.batch_parts(mesh)))


@libtpu
def test_small_a_batch_that_does_not_divide_is_not_compiled():
    done = ivideo("--config=configs/base.py:small", "--topology=v5e:2x2", "--config.train.batch_size=6")
    assert done.returncode == 2 and "batch_size = 6" in done.stderr and "choose a multiple of 4" in done.stderr


@libtpu
def test_small_what_does_not_fit_a_chip_ends_with_what_to_change():
    done = ivideo("--config=configs/base.py:demo", "--topology=v5e:2x2", "--config.train.batch_size=65536")
    assert done.returncode == 2, done.stderr[-2000:]
    assert "base:demo to train does not fit v5e:2x2" in done.stderr


@libtpu
def test_small_a_convolution_split_by_rows_gathers_its_kernel_once():
    """Else the partitioner takes the kernel in parts, one a device, and reads the video once for every part."""
    program = """
import jax, jax.numpy as jnp
from ivideo.devices import sharding
from ivideo.planning import compile, hlo
from ivideo.models import blocks

mesh = sharding.make_mesh({"fsdp": 8, "height": 2}, compile.topology_devices("v5e:4x4")[0])
layer = blocks.convolution(512, jnp.bfloat16, None)

def convolved(params, video):
    with sharding.layout(mesh):
        return sharding.constrain(layer.apply({"params": params}, video), *sharding.VIDEO)

def shape(sizes, where):
    return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=where)

video = shape((8, 64, 24, 40, 512), None)
params = {"kernel": shape((3, 3, 512, 512), None), "bias": shape((512,), None)}
params = jax.tree.map(lambda s, where: shape(s.shape, where), params, sharding.param_shardings(mesh, params))
video = shape(video.shape, sharding.logical_sharding(mesh, video.shape, sharding.VIDEO))
options = {"exec_time_optimization_effort": compile.EFFORT}
found = hlo.Program(jax.jit(convolved).lower(params, video).compile(options).as_text()).collectives(params)
print({name: (entry["runs"], entry["largest"]) for name, entry in found.items()})
"""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TPU_SKIP_MDS_QUERY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert ast.literal_eval(done.stdout) == {
        "all-gather of parameters": (1, "bf16[3,3,512,512]"),
        "collective-permute of activations": (2, "bf16[64,1,40,512]"),
    }
