"""Measures the peak memory of loading a text encoder of a published size, from files of zeros.

  python tests/text_memory.py FOLDER [--size=xxl] [--format=t5x] [--dtype=bfloat16]

writes float32 files, sparse or compressed, to FOLDER (existing files are reused), and loads them in another process. It
prints the increase of that process's peak resident memory, relative to the size of the parameters that it keeps.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent.parent)]

SIZES = {
    "small": {"vocab": 32128, "dim": 512, "layers": 8, "heads": 6, "head_dim": 64, "ff": 1024},
    "base": {"vocab": 32128, "dim": 768, "layers": 12, "heads": 12, "head_dim": 64, "ff": 2048},
    "large": {"vocab": 32128, "dim": 1024, "layers": 24, "heads": 16, "head_dim": 64, "ff": 2816},
    "xl": {"vocab": 32128, "dim": 2048, "layers": 24, "heads": 32, "head_dim": 64, "ff": 5120},
    "xxl": {"vocab": 32128, "dim": 4096, "layers": 24, "heads": 64, "head_dim": 64, "ff": 10240},
}
LOAD = """
import resource, sys
import jax
from ivideo import text
text.load_encoder  # everything is imported before memory is looked at
jax.device_put(0.0).block_until_ready()
def used():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024
before = used()
encoder = text.load_encoder(sys.argv[1], length=8, dtype=sys.argv[2], tokenizer=sys.argv[3])
kept = sum(leaf.nbytes for leaf in jax.block_until_ready(jax.tree.leaves(encoder.params)))
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


def shapes_of(sizes):
    import jax
    import numpy as np
    from flax import traverse_util

    from ivideo.text.t5 import T5Encoder

    tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
    tree = jax.eval_shape(T5Encoder(**sizes).init, jax.random.key(0), tokens, tokens)["params"]
    return {name: leaf.shape for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def write_safetensors(path: pathlib.Path, shapes):
    """Writes a sparse file: a header and a hole."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        f.truncate(8 + len(head) + end)


def write_t5x(path: pathlib.Path, shapes):
    """Writes a directory like T5X, with compressed zeros."""
    import numpy as np
    import t5_files
    import tensorstore as ts
    from flax import traverse_util

    path.mkdir(parents=True)
    index = {}
    for name, shape in shapes.items():
        directory = "target." + name.replace("/", ".")
        metadata = {
            "shape": list(shape),
            "chunks": list(shape),
            "dtype": "<f4",
            "compressor": {"id": "gzip", "level": 1},
        }
        kvstore = {"driver": "file", "path": f"{path / directory}/"}
        spec = {"driver": "zarr", "kvstore": kvstore, "metadata": metadata}
        spec["store_data_equal_to_fill_value"] = True
        ts.open(spec, create=True).result().write(np.zeros(shape, np.float32)).result()
        index[name] = {"driver": "zarr", "dtype": "float32", "kvstore": kvstore, "metadata": metadata}
    target = traverse_util.unflatten_dict(index, sep="/")
    t5_files.write_index(path, {"version": 3, "optimizer": {"target": target, "state": {}}})


def measure(path: pathlib.Path, dtype: str, tokenizer: str) -> tuple[int, int]:
    """(bytes of the parameters, peak bytes of memory while loading them)."""
    command = [sys.executable, "-c", LOAD, str(path), dtype, tokenizer]
    done = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(__file__).parent.parent)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    kept, peak = done.stdout.split()
    return int(kept), int(peak)


def main():
    import t5_files

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--size", choices=SIZES, default="xxl")
    parser.add_argument("--format", choices=("safetensors", "t5x"), default="t5x")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    sizes = SIZES[args.size]
    path = args.folder / (f"{args.size}.safetensors" if args.format == "safetensors" else f"{args.size}_checkpoint_1")
    if not path.exists():
        {"safetensors": write_safetensors, "t5x": write_t5x}[args.format](path, shapes_of(sizes))
    spiece = args.folder / "words.model"
    if not spiece.exists():
        t5_files.write_spiece(args.folder, 32_000, name=spiece.name, words=31_700)
    kept, peak = measure(path, args.dtype, str(spiece))
    print(f"{args.size} from {args.format}: {kept / 1e9:.2f} GB kept in {args.dtype}, {peak / 1e9:.2f} GB at the peak: "
          f"{peak / kept:.2f} times")  # fmt: skip


if __name__ == "__main__":
    main()
