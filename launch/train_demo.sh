#!/usr/bin/env bash
# Trains the weights of the package's small cascade from scratch: the text encoder, then one stage after the other.
#
#   launch/train_demo.sh FOLDER [STAGE …]
#
# Run it again after an interruption: each part continues where it stopped. tsr3 starts from the weights of tsr2. The other
# stages do not depend on each other, so several machines can train them at the same time.
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
# XLA runs much of a CPU program on one thread per device, so two devices split the batch
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} XLA_FLAGS="--xla_force_host_platform_device_count=2"

text=$folder/text.safetensors
[[ -e $text ]] || python -m ivideo.main --config=configs/base.py:demo --mode=train_text --out="$text"
for stage in "${stages[@]}"; do
  config=(--config="configs/$stage.py:demo" --config.text.checkpoint="$text" --workdir="$folder/$stage")
  [[ $stage != tsr3 ]] || config+=(--config.train.start="$folder/tsr2.safetensors")
  python -m ivideo.main "${config[@]}"
  python -m ivideo.main "${config[@]}" --mode=export --out="$folder/$stage.safetensors" --overwrite
done
