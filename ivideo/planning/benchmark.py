"""Times a stage on one device of this machine: its forward pass, training step and guided sampling step.

Weights and data are random, because speed does not depend on them: no checkpoint or data set is read. The training step
takes a batch of `config.train.batch_size` videos with embedded texts, the other two take one video.
"""

import json
import os
import statistics
import time

import flax
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from ivideo import stages
from ivideo.devices import flops
from ivideo.errors import UserError
from ivideo.planning.describe import columns, human, human_flops
from ivideo.training.step import TrainState, batch_shapes, make_train_step, model_flops, state_shapes

# Each case runs for this many seconds and at least this many times
MIN_SECONDS = 5.0
MIN_REPEATS = 3
MAX_REPEATS = 200
# The peak FLOP/s are measured with products of square matrices of this many rows, several products per run
PEAK_ROWS = {"cpu": 2048}
PEAK_ROWS_ACCELERATOR = 4096
PEAK_PRODUCTS = {"cpu": 1}
PEAK_PRODUCTS_ACCELERATOR = 16
RANDOM_SCALE = 1 / 16  # standard deviation of random weights and data
RANDOM_TOKEN = 3


def benchmark(config, *, as_json: bool = False, repeats: int | None = None) -> dict:
    """Prints the result of `measure` as a table or as JSON, and returns it."""
    found = measure(config, repeats=repeats)
    print(json.dumps(found, indent=2) if as_json else _table(found))
    return found


def measure(config, *, repeats: int | None = None) -> dict:
    """Median, minimum and maximum time of the three cases in seconds, after one warm-up run.

    `repeats`: timed runs per case; by default as many as take a few seconds.
    `flops`: the model's FLOPs (`ivideo.devices.flops`), without those of rematerialization.
    `share_of_peak`: FLOP/s relative to a matrix product in the model's dtype, which is timed too.
    `memory_bytes`: depends on `memory_source`: "device" is the device's peak since the program started, "compiler" is
    the sum of the case's arguments, results and temporaries.
    UserError before anything is compiled if the device's memory cannot hold the training state.
    """
    device = jax.devices()[0]
    _check_memory(config, device)
    peak = _product_rate(config.model.dtype, device)
    state = _state(config)
    found = {
        "stage": config.stage,
        "variant": config.variant,
        "dtype": config.model.dtype,
        "device": {"platform": device.platform, "kind": _device_kind(device), "cores": len(os.sched_getaffinity(0))},
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "flax": flax.__version__},
        "peak_flops_per_second": peak,
        "cases": {},
    }
    # The training step comes last, because it donates its state
    for case in (_forward, _sampling_step, _training_step):
        fn, args, donated, batch, count = case(config, state)
        timed = _time(fn, args, donated=donated, repeats=repeats, device=device)
        rate = count / timed["median_seconds"]
        work = {"batch": batch, "flops": count, "flops_per_second": rate, "share_of_peak": rate / peak}
        found["cases"][case.__name__.strip("_")] = {**work, **timed}
    return found


def _forward(config, state):
    model = stages.build_model(config)
    args, optional = _random(stages.model_inputs(config, 1))

    def forward(params, args, optional):
        return model.apply({"params": params}, *args, **optional)

    inputs = (state.params, args, optional)
    return forward, inputs, (), 1, flops.count(forward, *inputs)


def _sampling_step(config, state):
    """One step of the config's sampler, with both network evaluations of guidance."""
    one = config.copy_and_resolve_references()
    one.sample.steps = 1
    model = stages.build_model(config)
    (_, _, text, text_mask), optional = _random(stages.model_inputs(config, 1))

    def sampling_step(params, text, text_mask, keys, optional):
        return stages.sample(one, model, params, text, text_mask, keys, **optional)

    inputs = (state.params, text, text_mask, jax.random.split(jax.random.key(0), 1), optional)
    return sampling_step, inputs, (), 1, flops.count(sampling_step, *inputs)


def _training_step(config, state):
    inputs = (state, _random(batch_shapes(config)))
    return make_train_step(config), inputs, (0,), config.train.batch_size, model_flops(config)


def _state(config) -> TrainState:
    """A training state with random parameters, drawn by NumPy: initializing the network would take a compilation."""
    shapes = state_shapes(config)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return zeros.replace(params=_random(shapes.params), ema=_random(shapes.params))


def _random(shapes):
    """Arrays of these shapes: small normal numbers, one token repeated, and masks that are all True."""
    rng = np.random.default_rng(0)

    def draw(shape):
        if jnp.issubdtype(shape.dtype, jnp.floating):
            return jnp.asarray(RANDOM_SCALE * rng.standard_normal(shape.shape, np.float32), shape.dtype)
        return jnp.full(shape.shape, RANDOM_TOKEN, shape.dtype)

    return jax.tree.map(draw, shapes)


def _time(fn, args, *, donated=(), repeats=None, device) -> dict:
    """Times `fn(*args)` and its compilation, and measures memory. The first result replaces a donated argument."""
    start = time.perf_counter()
    compiled = jax.jit(fn, donate_argnums=donated).lower(*args).compile()
    compile_seconds = time.perf_counter() - start
    times = []
    while not _enough(times[1:], repeats):
        start = time.perf_counter()
        out = jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - start)
        if donated:
            args = (out[0], *args[1:])
    times = times[1:]  # the first run warms up
    return {
        "compile_seconds": compile_seconds,
        "repeats": len(times),
        "median_seconds": statistics.median(times),
        "min_seconds": min(times),
        "max_seconds": max(times),
        **_memory(compiled, device),
    }


def _enough(times: list[float], repeats: int | None) -> bool:
    if repeats is not None:
        return len(times) >= repeats
    return len(times) >= MIN_REPEATS and (sum(times) >= MIN_SECONDS or len(times) >= MAX_REPEATS)


def _memory(compiled, device) -> dict:
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return {"memory_bytes": stats["peak_bytes_in_use"], "memory_source": "device"}
    m = compiled.memory_analysis()
    total = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
    return {"memory_bytes": total, "memory_source": "compiler"}


def _product_rate(dtype: str, device) -> float:
    """FLOP/s of a product of two square matrices: the best of several runs."""
    size = PEAK_ROWS.get(device.platform, PEAK_ROWS_ACCELERATOR)
    chain = PEAK_PRODUCTS.get(device.platform, PEAK_PRODUCTS_ACCELERATOR)
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.float32).astype(dtype)

    def products(x):
        y = x
        for _ in range(chain):
            y = (y @ x) * size**-0.5
        return y

    best = _time(products, (x,), repeats=MIN_REPEATS, device=device)["min_seconds"]
    return chain * 2 * size**3 / best


def _check_memory(config, device) -> None:
    """UserError if the device's memory cannot hold the training state and the gradients."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None:
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    state = state_shapes(config)
    with_gradients = (state, state.params)
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(with_gradients))
    if needed > limit:
        raise UserError(
            f"{config.stage}:{config.variant} needs {human(needed, 'KMGTP')}B for parameters, their average, "
            f"optimizer and gradients, but {_device_kind(device)} has {human(limit, 'KMGTP')}B: benchmark a "
            f"smaller variant, such as --config=configs/{config.stage}.py:demo, or take a larger device"
        )


def _device_kind(device) -> str:
    """The device's name. Jax calls every processor 'cpu', so Linux's /proc/cpuinfo gives the processor's name."""
    if device.platform == "cpu":
        try:
            with open("/proc/cpuinfo") as f:
                return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
        except (OSError, StopIteration):
            pass
    return device.device_kind


def _table(found: dict) -> str:
    device, versions = found["device"], found["versions"]
    cores = f", {device['cores']} cores" if device["platform"] == "cpu" else ""
    lines = [
        f"{found['stage']}:{found['variant']} in {found['dtype']} on {device['kind']}{cores}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"peak: {human_flops(found['peak_flops_per_second'])}/s, a matrix product timed here",
        "",
    ]
    rows = [("", "batch", "median", "min", "max", "runs", "compile", "FLOPs", "per second", "of peak", "memory")]
    for name, case in found["cases"].items():
        times = [f"{1e3 * case[key]:.4g} ms" for key in ("median_seconds", "min_seconds", "max_seconds")]
        rows.append((
            name.replace("_", " "), case["batch"], *times, case["repeats"], f"{case['compile_seconds']:.3g} s",
            human_flops(case["flops"]), human_flops(case["flops_per_second"]), f"{case['share_of_peak']:.1%}",
            f"{human(case['memory_bytes'], 'KMGTP')}B",
        ))  # fmt: skip
    source = {
        "device": "the device's peak so far",
        "compiler": "the compiler's sum of arguments, results and temporaries",
    }
    used = next(iter(found["cases"].values()))["memory_source"]
    return "\n".join([*lines, *columns(rows), "", f"Weights and data are random. Memory is {source[used]}."])
