#!/usr/bin/env bash
# A Cloud TPU slice, from nothing to a training run on all of its hosts. Needs gcloud, logged in, with a project set.
#
#   launch/tpu_vm.sh create  NAME --zone=ZONE --type=v5p-128 [--spot] [--version=RUNTIME]
#   launch/tpu_vm.sh install NAME --zone=ZONE
#   launch/tpu_vm.sh run     NAME --zone=ZONE -- --config=configs/ssr2.py --workdir=/mnt/shared/ssr2 …
#   launch/tpu_vm.sh logs    NAME --zone=ZONE [--worker=0]
#   launch/tpu_vm.sh delete  NAME --zone=ZONE [--yes]
#
# `install` copies this checkout to every host and makes its environment anew, with Python 3.12; again after changes to it.
# `run` is the command of ivideo.main on every host; while the slice is there, it starts again where that left with 75, 76, 77
# or 134 (stopped and saved, a step hung, a process was lost), after 30 s (PAUSE), 20 times in a row at most (RESTARTS): a run
# of an hour (LONG, in seconds) begins a new row. A slice that Google took back, as it may any with --spot, is gone and `run`
# ends with gcloud's error: nothing here makes another. `delete` what is left of its request, then `create`, `install` and
# `run` as before, and the run goes on from its --workdir, which has to be storage that all hosts share and that outlives the
# slice. `create` without --spot waits in a queue. --dry_run, or DRY_RUN=1, prints the commands and runs none.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"

[[ $# -gt 0 ]] || fail "no action: expected create, install, run, logs or delete; see --help"
case $1 in -h | --help) usage && exit 0 ;; esac
action=$1
shift
case $action in create | install | run | logs | delete) ;; *) fail "action '$action' is unknown: expected create, install, run, logs or delete" ;; esac
[[ $# -gt 0 && $1 != -* ]] || fail "no name: expected launch/tpu_vm.sh $action NAME --zone=ZONE"
name=$1
shift
[[ $name =~ ^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$ ]] ||
  fail "NAME='$name': expected small letters, digits and -, at most 63, the first a letter and the last no -"
zone='' type='' spot='' version='' worker=0 yes=''
rest=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --spot) spot=--spot ;;
    --yes) yes=--quiet ;;
    --dry_run) export DRY_RUN=1 ;;
    --) shift && rest=("$@") && break ;;
    *) fail "'$1' is unknown: expected --zone=, --type=, --version=, --worker=, --spot, --yes, --dry_run, and -- before the arguments of ivideo.main" ;;
  esac
  shift
done
[[ $worker =~ ^([0-9]+|all)$ ]] || fail "--worker=$worker: expected the number of a host, from 0, or all"
[[ -n $zone ]] || fail "--zone is missing: give the slice's zone, such as --zone=us-east5-a"

tpu() { gcloud_tpu=(gcloud compute tpus tpu-vm "$@" "--zone=$zone"); }

on_all() { # a command line on every host at once
  tpu ssh "$name" --worker=all "--command=$1"
  "${2:-run}" "${gcloud_tpu[@]}"
}

# The runtime that the generation's documentation names; Cloud TPU has no newest one to ask for
runtime() {
  case $type in
    v6e-[1-9]*) echo v2-alpha-tpuv6e ;;
    v5p-[1-9]*) echo v2-alpha-tpuv5 ;;
    v5litepod-[1-9]*) echo v2-alpha-tpuv5-lite ;;
    v4-[1-9]*) echo tpu-ubuntu2204-base ;;
    *) fail "--type=$type: expected a slice such as v5p-128, v6e-64, v5litepod-256 or v4-64, or give --version=RUNTIME" ;;
  esac
}

needs gcloud "install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install), then run gcloud init"

case $action in
  create)
    [[ -n $type ]] || fail "--type is missing: give the slice, such as --type=v5p-128 or --type=v6e-64"
    [[ -n $version ]] || version=$(runtime) || exit 2
    run gcloud compute tpus queued-resources create "$name" "--node-id=$name" "--zone=$zone" "--accelerator-type=$type" \
      "--runtime-version=$version" ${spot:+"$spot"}
    ;;
  install)
    # The checkout as it is, so that changes travel too; build outputs stay here
    archive=/tmp/ivideo.tar.gz
    left_out=()
    for pattern in .git runs .venv venv build '*.egg-info' __pycache__ .pytest_cache .ruff_cache; do
      left_out+=("--exclude=$pattern")
    done
    run tar "${left_out[@]}" -czf "$archive" -C "$here/.." .
    tpu scp "$archive" "$name:/tmp/ivideo.tar.gz" --worker=all
    run "${gcloud_tpu[@]}"
    # The images' own Python may be 3.10, which is too old; uv brings one. --clear: without it, uv does not replace what an
    # earlier install made
    on_all 'mkdir -p ~/ivideo && tar -xzf /tmp/ivideo.tar.gz -C ~/ivideo && cd ~/ivideo && python3 -m pip install --user --quiet uv && ~/.local/bin/uv venv --quiet --clear --python 3.12 .venv && ~/.local/bin/uv pip install --quiet --python .venv ".[tpu]"'
    ;;
  run)
    [[ ${#rest[@]} -gt 0 ]] || fail "no arguments of ivideo.main: give them after --, such as -- --config=configs/ssr2.py --workdir=DIR"
    # SIGTERM to any host reaches all of them, which save and leave together
    on_all "cd ~/ivideo && .venv/bin/python -m ivideo.main --distributed $(quoted "${rest[@]}") 2>&1 | tee -a ~/ivideo.log; exit \${PIPESTATUS[0]}" again
    ;;
  logs)
    tpu ssh "$name" "--worker=$worker" "--command=tail -n 100 -f ~/ivideo.log"
    run "${gcloud_tpu[@]}"
    ;;
  delete)
    run gcloud compute tpus queued-resources delete "$name" "--zone=$zone" --force ${yes:+"$yes"}
    ;;
esac
