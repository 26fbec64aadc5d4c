r"""Compares the speed of VideoUNet and imagen-pytorch's Unet3D on this machine's CPU. This is a command, not a test:

  python -m venv /tmp/peer && /tmp/peer/bin/pip install torch imagen-pytorch==2.1.0
  python tests/peers/bench_imagen_pytorch.py --peer_python=/tmp/peer/bin/python [--layout=same] [--pairs=5] [--json]

Both networks predict v for one video of 16 × 32 × 32 with a text of 64 × 768, in float32, each with the default threads
of its library. Two cases are timed: the forward pass, and a training step (mean squared error, backward pass, Adam).
The networks stay loaded in two processes and take turns. The ratio is the median, over pairs of neighbouring turns, of
the peer's time divided by ours. Exit code 1 if the numbers of parameters differ by more than 10%.

--layout=own, the default, compares each library's own network of about 19M parameters that downsamples the frame before
its first block, as Efficient U-Net and the paper's stages do: the peer's defaults with `memory_efficient`, and ours.
Both work at 16, 8 and 4 pixels. They distribute their parameters differently, as the printed FLOPs show: ours has one
block per level, and most channels at the smallest frames. The comparison does not measure which one learns more per
step.

--layout=same copies the peer's widths, blocks and resolutions, so that the FLOPs match too:

  each side has                  Unet3D (imagen-pytorch 2.1.0)        VideoUNet
  resolutions                    32, 16, 8                            the same
  channels down / up             128, 128, 256 / 128, 256, 256        128, 256, 256, both ways
  residual blocks per level      1 each way, 2 in the middle          1 each way, 1 in the middle
  attention to the text          in each block except at 32 × 32      the same
  attention in time              after each level, each way, in the   in each block
                                 middle and behind the stem
  attention in space             none: its attention is joint in      none
                                 space and time
  heads of 64 channels           4, in time with one key and value    channels / 64
  convolution in time            after each spatial 3 × 3, and one a  none
                                 channel before attention in time;
                                 neither can be left out
  downsampling                   pixels folded, 1 × 1                 3 × 3 of stride 2
  upsampling                     1 × 1, channels unfolded (its        nearest, 3 × 3
                                 nearest kind enlarges time as well)
  stem, end                      3 × 3                                3 × 3

In that layout, the peer's optional parts are off: joint attention, text pooling, global context, cross-embedded stem,
last residual block. In both layouts, neither side has joint attention over space and time. The peer runs as eager
PyTorch, as its users run it; ours is jitted.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

VIDEO = (1, 16, 32, 32, 3)
TEXT = (1, 64, 768)
OURS = {
    "spatial_attention": (False, False, False),
    "cross_attention": (False, True, True),
    "temporal": ("attention", "attention", "attention"),
    "head_dim": 64,
    "max_distance": 16,
    "scan_unroll": 0,  # convolutions in loops are slow on a processor
}
PEER = {
    "layer_attns": False,
    "attend_at_middle": False,
    "layer_cross_attns": (False, True, True),
    "time_causal_attn": False,
    "text_embed_dim": TEXT[2],
    "max_text_len": TEXT[1],
}
LAYOUTS = {
    "own": {
        "ours": {**OURS, "channels": (64, 128, 384), "blocks": (1, 1, 1), "strides": (2, 2, 2)},
        "peer": {**PEER, "dim": 64, "dim_mults": (1, 2, 4), "memory_efficient": True},
    },
    "same": {
        "ours": {**OURS, "channels": (128, 256, 256), "blocks": (1, 1, 1), "strides": (1, 2, 2)},
        "peer": {
            **PEER,
            "dim": 128,
            "dim_mults": (1, 2, 2),
            "num_resnet_blocks": 0,  # beside the one with attention that each level has
            "attn_heads": 4,
            "attn_dim_head": 64,
            "attn_pool_text": False,
            "use_global_context_attn": False,
            "init_cross_embed": False,
            "init_conv_kernel_size": 3,
            "final_resnet_block": False,
        },
    },
}
CASES = ("forward", "training step")


def ours(layout):
    """Our network: (parameters, FLOPs of a forward pass, one function per case that runs it once)."""
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
    import jax
    import jax.numpy as jnp
    import optax

    from ivideo.devices import flops
    from ivideo.models.unet import VideoUNet

    model = VideoUNet(**LAYOUTS[layout]["ours"])
    key = jax.random.key(0)
    z, v = jax.random.normal(key, (2, *VIDEO))
    inputs = (z, jnp.zeros(1), jax.random.normal(key, TEXT), jnp.ones(TEXT[:2], bool))
    params = jax.jit(model.init)(key, *inputs)
    optimizer = optax.adam(1e-4)
    state = [params, optimizer.init(params)]
    apply = jax.jit(model.apply)

    def update(params, opt_state):
        grads = jax.grad(lambda p: ((model.apply(p, *inputs) - v) ** 2).mean())(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    step = jax.jit(update, donate_argnums=(0, 1))

    def train():
        state[:] = jax.block_until_ready(step(*state))

    count = sum(p.size for p in jax.tree.leaves(params))
    cases = {"forward": lambda: jax.block_until_ready(apply(state[0], *inputs)), "training step": train}
    return count, flops.count(model.apply, params, *inputs), cases


def peer(layout):
    """The peer's network, in the same form."""
    import torch
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    # Its import asks the network for the width of a text encoder; that of T5 1.1 base is 768
    transformers.T5Config.from_pretrained = classmethod(lambda cls, name, **_: cls(d_model=768))
    from imagen_pytorch import Unet3D

    torch.manual_seed(0)
    unet = Unet3D(**LAYOUTS[layout]["peer"])
    b, t, h, w, c = VIDEO
    z, v = torch.randn(2, b, c, t, h, w)
    logsnr, text, mask = torch.zeros(1), torch.randn(TEXT), torch.ones(TEXT[:2], dtype=torch.bool)
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-4)

    def apply():
        return unet(z, logsnr, text_embeds=text, text_mask=mask)

    def forward():
        with torch.inference_mode():
            apply()

    def train():
        optimizer.zero_grad()
        ((apply() - v) ** 2).mean().backward()
        optimizer.step()

    with FlopCounterMode(display=False) as counter:
        forward()
    count = sum(p.numel() for p in unet.parameters())
    return count, counter.get_total_flops(), {"forward": forward, "training step": train}


def serve(side, layout: str) -> None:
    """Runs a worker: it prints its sizes, then reads the name of a case per line, runs it, and prints its seconds."""
    answer = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is not an answer
    count, flops, cases = side(layout)
    print(json.dumps({"parameters": count, "forward_flops": flops}), file=answer, flush=True)
    for line in sys.stdin:
        case = cases[line.strip()]
        case()  # compiles, and after the other side's turn fills the caches
        times = []
        while len(times) < 3:
            start = time.perf_counter()
            case()
            times.append(time.perf_counter() - start)
        print(json.dumps(statistics.median(times)), file=answer, flush=True)


class Worker:
    """A process with one side's network."""

    def __init__(self, python: str, side: str, layout: str):
        command = [python, __file__, f"--worker={side}", f"--layout={layout}"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.sizes = self._read()

    def _read(self):
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self._process.args)} ended with exit code {self._process.wait()}: see above")
        return json.loads(line)

    def seconds(self, case: str) -> float:
        self._process.stdin.write(case + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self):
        self._process.stdin.close()
        self._process.wait()


def compare(peer_python: str, layout: str, pairs: int) -> dict:
    """(sizes of both sides, milliseconds per case and side, ratios)."""
    workers = {"ours": Worker(sys.executable, "ours", layout), "peer": Worker(peer_python, "peer", layout)}
    found = {name: dict(worker.sizes) for name, worker in workers.items()}
    found["parameter_ratio"] = found["peer"]["parameters"] / found["ours"]["parameters"]
    comparable = abs(found["parameter_ratio"] - 1) <= 0.1
    for case in CASES if comparable else ():
        turns = {name: [] for name in workers}
        for _ in range(pairs + 1):
            for name, worker in workers.items():
                time.sleep(0.5)  # threads of the other side spin for a while after their work
                turns[name].append(worker.seconds(case))
        pairwise = [peer / ours for peer, ours in list(zip(turns["peer"], turns["ours"], strict=True))[1:]]
        for name, times in turns.items():
            found[name][f"{case} ms"] = 1e3 * statistics.median(times[1:])
        found[case] = {"ratio": statistics.median(pairwise), "min": min(pairwise), "max": max(pairwise), "pairs": pairs}
    for worker in workers.values():
        worker.close()
    return {**found, "comparable": comparable}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", help="python of an environment with torch and imagen-pytorch 2.1.0")
    parser.add_argument("--layout", choices=LAYOUTS, default="own", help="of the networks, see above")
    parser.add_argument("--pairs", type=int, default=5, help="turns of each side that count")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--worker", choices=("ours", "peer"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve({"ours": ours, "peer": peer}[args.worker], args.layout)
        return 0
    if not args.peer_python:
        parser.error("--peer_python is missing: the python of an environment with torch and imagen-pytorch 2.1.0")
    found = compare(args.peer_python, args.layout, args.pairs)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print(f"{'':14}{'ours':>12}{'peer':>12}   peer / ours")
        for key, unit, scale in (("parameters", "M", 1e6), ("forward_flops", "G", 1e9)):
            a, b = (found[name][key] / scale for name in ("ours", "peer"))
            print(f"{key.replace('_flops', ' FLOPs'):14}{a:11.2f}{unit}{b:11.2f}{unit}   {b / a:.2f}")
        for case in CASES if found["comparable"] else ():
            a, b = (found[name][f"{case} ms"] for name in ("ours", "peer"))
            r = found[case]
            print(f"{case:14}{a:9.1f} ms{b:9.1f} ms   {r['ratio']:.2f}  ({r['min']:.2f} to {r['max']:.2f})")
    if not found["comparable"]:
        print(f"parameters differ by more than 10% (peer / ours {found['parameter_ratio']:.2f})", file=sys.stderr)
    return 0 if found["comparable"] else 1


if __name__ == "__main__":
    sys.exit(main())
