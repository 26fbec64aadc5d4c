#!/usr/bin/env bash
# Creates a Cloud TPU slice and runs ivideo.main on all of its hosts. Needs gcloud, logged in, with a project set.
#
#   launch/tpu_vm.sh create  NAME --zone=ZONE --type=v5p-128 [--spot] [--version=RUNTIME]
#   launch/tpu_vm.sh install NAME --zone=ZONE
#   launch/tpu_vm.sh run     NAME --zone=ZONE -- --config=configs/ssr2.py --workdir=/mnt/shared/ssr2 …
#   launch/tpu_vm.sh logs    NAME --zone=ZONE [--worker=0]
#   launch/tpu_vm.sh delete  NAME --zone=ZONE [--yes]
#
# `create` without --spot waits in a queue.
# `install` copies this checkout to every host and makes a new environment there, with Python 3.12. Repeat it after changes.
# `run` runs ivideo.main on every host. As long as the slice exists, it restarts after exit codes 75, 76, 77 and 134 (stopped
# and saved, a step hung, a process was lost), after 30 s (PAUSE), at most 20 times in a row (RESTARTS). A run of an hour (LONG,
# in seconds) resets that count. The --workdir must be storage that all hosts share and that outlives the slice.
# Google may take back a slice, any time if it was created with --spot. `run` then ends with gcloud's error, and does not create
# another slice. `delete` the rest of its request, then `create`, `install` and `run` again: the run continues from its
# --workdir.
# --dry_run, or DRY_RUN=1, prints the commands without running them.
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
  fail "NAME='$name': expected at most 63 lowercase letters, digits and hyphens, with a letter first and no hyphen last"
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

on_all() { # runs a command line on every host at once
  tpu ssh "$name" --worker=all "--command=$1"
  "${2:-run}" "${gcloud_tpu[@]}"
}

# The runtime version of each TPU generation in Google's documentation; Cloud TPU has no name for the newest
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
    # The checkout with its uncommitted changes, without build outputs
    archive=/tmp/ivideo.tar.gz
    left_out=()
    for pattern in .git runs .venv venv build '*.egg-info' __pycache__ .pytest_cache .ruff_cache; do
      left_out+=("--exclude=$pattern")
    done
    run tar "${left_out[@]}" -czf "$archive" -C "$here/.." .
    tpu scp "$archive" "$name:/tmp/ivideo.tar.gz" --worker=all
    run "${gcloud_tpu[@]}"
    # The image's own Python may be 3.10, which is too old, so uv installs one. --clear replaces an earlier environment
    on_all 'mkdir -p ~/ivideo && tar -xzf /tmp/ivideo.tar.gz -C ~/ivideo && cd ~/ivideo && python3 -m pip install --user --quiet uv && ~/.local/bin/uv venv --quiet --clear --python 3.12 .venv && ~/.local/bin/uv pip install --quiet --python .venv ".[tpu]"'
    ;;
  run)
    [[ ${#rest[@]} -gt 0 ]] || fail "no arguments of ivideo.main: give them after --, such as -- --config=configs/ssr2.py --workdir=DIR"
    # If any host gets SIGTERM, all of them save and exit together
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
