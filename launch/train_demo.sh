#!/usr/bin/env bash
# Makes the weights that the package ships, from nothing: the text encoder, then the stages one after the other.
#
#   launch/train_demo.sh FOLDER [STAGE …]
#
# Safe to run again: each part goes on where it stopped. tsr3 begins with the weights of tsr2; else the stages do not depend
# on each other, and can be trained at the same time on several machines.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"

case ${1:-} in -h | --help) usage && exit 0 ;; esac
[[ -n ${1:-} && $1 != -* ]] || fail "no folder: expected launch/train_demo.sh FOLDER [STAGE …]"
folder=$1
shift
all=(base tsr1 ssr1 ssr2 tsr2 tsr3 ssr3)
stages=("$@")
[[ $# -gt 0 ]] || stages=("${all[@]}")
for stage in "${stages[@]}"; do
  [[ " ${all[*]} " == *" $stage "* ]] || fail "stage '$stage' is unknown: expected some of ${all[*]}"
done
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$here/.."
# Two host devices split the batch: XLA runs much of a CPU program on one thread a device
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} XLA_FLAGS="--xla_force_host_platform_device_count=2"

text=$folder/text.safetensors
[[ -e $text ]] || python -m ivideo.main --config=configs/base.py:demo --mode=train_text --out="$text"
for stage in "${stages[@]}"; do
  config=(--config="configs/$stage.py:demo" --config.text.checkpoint="$text" --workdir="$folder/$stage")
  [[ $stage != tsr3 ]] || config+=(--config.train.start="$folder/tsr2.safetensors")
  python -m ivideo.main "${config[@]}"
  python -m ivideo.main "${config[@]}" --mode=export --out="$folder/$stage.safetensors" --overwrite
done
