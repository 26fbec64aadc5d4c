#!/usr/bin/env bash
# Makes the weights that the package ships, from nothing: the text encoder, then the base stage.
# Usage: launch/train_demo.sh FOLDER. Safe to run again: each part goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?usage: launch/train_demo.sh FOLDER}
mkdir -p "$folder"
# Two host devices split the batch: XLA runs much of a CPU program on one thread a device
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} XLA_FLAGS="--xla_force_host_platform_device_count=2"

text=$folder/text.safetensors
[ -e "$text" ] || python -m ivideo.main --config=configs/base.py:demo --mode=train_text --out="$text"
python -m ivideo.main --config=configs/base.py:demo --config.text.checkpoint="$text" --workdir="$folder/base"
python -m ivideo.main --config=configs/base.py:demo --config.text.checkpoint="$text" --mode=export \
  --workdir="$folder/base" --out="$folder/base.safetensors" --overwrite
