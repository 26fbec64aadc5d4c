"""Compiles a stage's programs for a TPU slice on a machine without one, and reports the resources that they need.

The compiler is the TPU's own (libtpu), so a program that does not fit a chip fails here as it would there. Bytes and
FLOPs are per device and step. The seconds are a roofline, max(FLOPs / peak, bytes / bandwidth): a lower bound on the
time of this program, not a measurement. It leaves out communication between chips.
"""

import functools
import json
import math
import os
import re
import time

import jax
import jax.numpy as jnp

from ivideo import checks, stages
from ivideo.devices import flops, sharding
from ivideo.devices.chips import CHIPS, slice_of
from ivideo.errors import UserError
from ivideo.files import refuse_existing, write_json
from ivideo.planning.describe import columns, forward_flops, human, human_flops
from ivideo.planning.hlo import Program
from ivideo.text import encode, encoder_module
from ivideo.training import distill_step, step

# Lowest optimization effort: compiling takes minutes instead of an hour on two cores. The compiler then keeps no
# activations in on-chip memory between operations, so the bytes are an upper estimate
EFFORT = -1.0
# Options that make libtpu describe the same devices as jax finds on a real slice: a v4 chip's two cores are one device
LIBTPU_OPTIONS = {"v4": {"chip_config_name": "megacore"}}
# The programs of distillation, and the kind of student of each. A stochastic student's step costs the same
DISTILL = {"distill-guidance": "guidance", "distill-round": "deterministic"}


def compile_stage(config, topology: str, *, what="train", effort=EFFORT, as_json=False, out=None, overwrite=False):
    """Prints the result of `measure` as a table or as JSON, writes it to `out` as JSON, and returns it.

    `what`: as in `measure`, or 'distill' for both steps of distillation. The JSON is then an object of both results.
    """
    if out is not None:
        refuse_existing([out], overwrite=overwrite)
    both = {}
    for program in DISTILL if what == "distill" else (what,):
        both[program] = measure(config, topology, what=program, effort=effort)
        if not as_json:
            print(table(both[program]) + "\n" * (what == "distill"), flush=True)
    found = both if what == "distill" else both[what]
    if as_json:
        print(json.dumps(found, indent=2))
    if out is not None:
        write_json(out, found)
    return found


def measure(config, topology: str, *, what: str = "train", effort: float = EFFORT) -> dict:
    """Compiles one program for a slice and returns its memory, FLOPs, memory traffic, communication and roofline.

    `what`: 'train' is the training step, 'distill-guidance' a step of the first phase of distillation, 'distill-round'
    a step of a later phase, 'sample' one step of the distilled sampler for one video, 'text' the text encoder for
    `config.text.batch` texts of maximum length.
    `topology`: a slice's name, such as v5p:4x4x4. The mesh is `config.train.mesh`, `sample.mesh` or `text.mesh`.
    In the result, `flops`, `bytes`, `memory` and `peaks` are per device, which is a chip, or half a chip of TPU7x.
    `model_flops` are those of all devices together (`ivideo.devices.flops`), without rematerialization.
    UserError if Google offers no such slice, if the mesh or the batch does not fit it, or if the program does not fit
    the devices' memory; the message then suggests changes.
    """
    check_what(config, what)
    devices, chip = topology_devices(topology)
    trains = what in ("train", *DISTILL)
    mesh = sharding.make_mesh(config["train" if trains else what].mesh, devices)
    if trains:
        step.check_batch(config, mesh)
    fn, args, out_shardings, donated = PROGRAMS[what](config, mesh)
    model_flops = count_flops(config, what)
    params = args[0].params if trains else args[0]
    began = time.perf_counter()
    lowered = jax.jit(fn, donate_argnums=donated, out_shardings=out_shardings).lower(*args)
    try:
        compiled = lowered.compile({"exec_time_optimization_effort": effort})
    except jax.errors.JaxRuntimeError as e:
        found = _does_not_fit(e, config, topology, what)
        if found is e:
            raise
        raise found from e
    seconds = time.perf_counter() - began
    memory, program = compiled.memory_analysis(), Program(compiled.as_text())
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = CHIPS[chip].device()
    times = {"flops": program.flops / peak.flops, "bytes": program.bytes / peak.bandwidth}
    roofline = max(times.values())
    return {
        "stage": config.stage, "variant": config.variant, "what": what,
        "topology": topology, "chip": chip, "chips": len(devices) // CHIPS[chip].devices, "devices": len(devices),
        "mesh": dict(mesh.shape),
        "batch": config.train.batch_size if trains else {"sample": 1, "text": config.text.batch}[what],
        "accumulate": config.train.accumulate if trains else 1,
        "remat": config.model.remat if trains else "none",
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
        "model_flops": model_flops, "flops": program.flops, "bytes": program.bytes,
        "memory": {
            "arguments": arguments, "temporaries": temporary, "results": results,
            "peak": memory.peak_memory_in_bytes, "capacity": peak.memory,
        },
        "collectives": program.collectives(params),
        "peaks": {"flops_per_second": peak.flops, "bytes_per_second": peak.bandwidth},
        "roofline_seconds": roofline, "bound_by": max(times, key=times.get),
        "mfu_bound": model_flops / (len(devices) * peak.flops * roofline),
        "compile_seconds": seconds, "effort": effort, "jax": jax.__version__,
    }  # fmt: skip


def check_what(config, what: str) -> None:
    """UserError where a step that updates parameters is asked for of a student's config."""
    if what in ("train", *DISTILL):
        checks.check_original(config)


def topology_devices(topology: str):
    """The devices of a slice as libtpu describes them, and the chip's name. UserError if there is no such slice."""
    name, sizes = slice_of(topology)
    options = dict(LIBTPU_OPTIONS.get(name, {}))
    if math.prod(sizes) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)  # libtpu's default is four chips per host
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # otherwise libtpu waits for a metadata server
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing runs here, so another process may use the chips
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices, name
    except Exception as e:  # libtpu is missing or does not know the chip
        reason = " ".join(str(e).split())[:200]
        raise UserError(
            f"--topology={topology}: there is no compiler for it ({reason}); install libtpu with "
            f"`pip install '.[tpu]'`, in a version that supports {name}"
        ) from e


def training_program(config, mesh):
    """The training step as (function, argument shapes with shardings, result shardings, donated arguments)."""
    state, batch = step.state_shapes(config), step.batch_shapes(config)
    state = _with_shardings(state, sharding.param_shardings(mesh, state))
    batch = _with_shardings(batch, sharding.batch_shardings(mesh, batch))
    results = (jax.tree.map(lambda leaf: leaf.sharding, state), sharding.replicated(mesh))
    return step.make_train_step(config, mesh), (state, batch), results, (0,)


def distillation_program(kind: str, config, mesh):
    """As `training_program`, of the step of distillation that makes a student of this kind."""
    state, teacher = distill_step.state_shapes(config), distill_step.teacher_shapes(config, kind)
    batch = step.batch_shapes(config)
    state, teacher = (_with_shardings(tree, sharding.param_shardings(mesh, tree)) for tree in (state, teacher))
    batch = _with_shardings(batch, sharding.batch_shardings(mesh, batch))
    steps = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    results = (jax.tree.map(lambda leaf: leaf.sharding, state), sharding.replicated(mesh))
    return distill_step.make_distill_step(config, mesh, kind), (state, teacher, batch, steps), results, (0,)


def sampling_program(config, mesh):
    """One step of the distilled sampler for one video, in the form of `training_program`."""
    one = one_step(config)
    model, args = stages.build_model(one), sampling_shapes(one)

    def sample(params, text, text_mask, keys, low):
        with sharding.layout(mesh):
            return stages.sample(one, model, params, text, text_mask, jax.random.wrap_key_data(keys), low_res=low)

    params = _with_shardings(args[0], sharding.param_shardings(mesh, args[0]))
    rest = jax.tree.map(lambda s: _with_sharding(s, sharding.input_sharding(mesh, s.shape)), args[1:])
    video = sharding.logical_sharding(mesh, (1, *stages.video_shape(config)), sharding.VIDEO)
    return sample, (params, *rest), video, ()


def text_program(config, mesh):
    """The text encoder on a batch of texts of maximum length, in the form of `training_program`."""
    fn, (params, *texts) = _text_encoder(config)
    params = _with_shardings(params, sharding.param_shardings(mesh, params))
    texts = _with_shardings(texts, sharding.batch_shardings(mesh, texts))

    def encode_texts(*args):
        with sharding.layout(mesh):
            return fn(*args)

    out = sharding.logical_sharding(mesh, (config.text.batch, config.text.length, config.text.dim), sharding.VIDEO[:1])
    return encode_texts, (params, *texts), out, ()


def _text_encoder(config):
    """(the encoder as a function of parameters, tokens and mask, the shapes of its arguments)."""
    module, texts = encoder_module(config.text), (config.text.batch, config.text.length)
    tokens, mask = jax.ShapeDtypeStruct(texts, jnp.int32), jax.ShapeDtypeStruct(texts, bool)
    params = jax.eval_shape(module.init, jax.random.key(0), tokens, mask)["params"]
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, module.dtype), params)
    return functools.partial(encode, module), (params, tokens, mask)


def one_step(config):
    """The config of a distilled stage with a sampler of one step, which evaluates the network once."""
    one = stages.distilled(config, "1_stochastic")
    one.sample.guidance = "constant"
    one.model.remat = "none"
    return one


def sampling_shapes(config):
    """Shapes of the arguments of `stages.sample` for one video: params, text, mask, key data, and `low` or None."""
    (_, _, text, mask), _ = stages.model_inputs(config, 1)
    dtype = jnp.dtype(config.model.dtype)
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), stages.param_shapes(config))
    low = None
    if config.cond.frames:
        low = jax.ShapeDtypeStruct((1, config.cond.frames, config.cond.height, config.cond.width, 3), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.key_data(jax.random.split(jax.random.key(0), 1)))
    return params, text, mask, keys, low


def count_flops(config, what: str) -> int:
    """The model's FLOPs per step over all chips, without those of rematerialization."""
    if what == "text":
        fn, shapes = _text_encoder(config)
        return flops.count(fn, *shapes)
    if what in DISTILL:
        return distill_step.model_flops(config, DISTILL[what])
    return step.model_flops(config) if what == "train" else forward_flops(one_step(config))


PROGRAMS = {
    "train": training_program,
    **{what: functools.partial(distillation_program, kind) for what, kind in DISTILL.items()},
    "sample": sampling_program,
    "text": text_program,
}


def _with_shardings(shapes, shardings):
    return jax.tree.map(_with_sharding, shapes, shardings)


def _with_sharding(shape, where):
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)


def _does_not_fit(error, config, topology: str, what: str) -> Exception:
    """A UserError with suggestions if a chip's memory is too small for the program; otherwise the error itself."""
    message = str(error)
    used = re.search(r"Used ([\d.]+\w?) of ([\d.]+\w?) hbm", message)
    if "RESOURCE_EXHAUSTED" not in message and used is None:
        return error
    numbers = f": {used[1]} of {used[2]} per device" if used else ""
    change = {
        **dict.fromkeys(
            ("train", *DISTILL),
            "a larger slice, a larger config.train.accumulate, config.model.remat='full', or rows and frames "
            "split over devices (config.train.mesh.height, frames)",
        ),
        "sample": "a larger slice, more devices for config.sample.mesh.frames and height, or config.sample.window",
        "text": "a smaller config.text.batch, or split the parameters over devices (config.text.mesh.fsdp or tensor)",
    }[what]
    return UserError(f"{config.stage}:{config.variant} to {what} does not fit {topology}{numbers}. Use {change}")


def _chip_count(found: dict) -> str:
    """The number of chips of a slice, and of devices if that differs."""
    chips = f"{found['chips']} chip{'s' * (found['chips'] > 1)}"
    return chips if found["devices"] == found["chips"] else f"{chips}, {found['devices']} devices"


def gib(size: int) -> str:
    """Bytes in GiB (2^30), the unit in which chips' capacities are given."""
    return f"{size / 2**30:.3g} GiB"


def table(found: dict) -> str:
    """The result of `measure` as a readable table."""
    memory = {name: gib(size) for name, size in found["memory"].items()}
    mesh = " × ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1) or "one device"
    peaks = found["peaks"]
    lines = [
        f"{found['stage']}:{found['variant']}, one step of mode {found['what']} on {found['topology']} "
        f"({_chip_count(found)}: {mesh}), batch {found['batch']}",
        f"parameters   {human(found['parameters'])}",
        f"model        {human_flops(found['model_flops'])} per step, over all devices",
        f"per device   {human_flops(found['flops'])}, {human(found['bytes'], 'KMGTP')}B of memory traffic",
        f"memory       {memory['peak']} of {memory['capacity']} at the peak; arguments {memory['arguments']}, "
        f"results {memory['results']}, all temporaries {memory['temporaries']}",
        f"roofline     {found['roofline_seconds']:.4g} s per step, bound by {found['bound_by']}, at "
        f"{human_flops(peaks['flops_per_second'])}/s and {human(peaks['bytes_per_second'], 'KMGTP')}B/s",
        f"utilisation  {found['mfu_bound']:.1%} of peak at most",
        f"compiled in  {found['compile_seconds']:.0f} s",
        "",
    ]
    rows = [("communication", "count", "runs", "bytes", "largest")]
    for name, entry in found["collectives"].items():
        rows.append((name, entry["count"], entry["runs"], f"{human(entry['bytes'], 'KMGTP')}B", entry["largest"]))
    return "\n".join(lines + columns(rows))
