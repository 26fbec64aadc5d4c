#!/usr/bin/env bash
# One training run on several machines that are reached by ssh and share a disk: one process a machine.
#
#   launch/hosts.sh HOST1,HOST2,… [--folder=ivideo] [--port=8476] [--dry_run] -- --config=configs/ssr2.py --workdir=DIR …
#
# The first host is the one that the others find each other by (--coordinator). --folder is the checkout on every host, with
# an environment in .venv. Each line of output begins with its host. Where one process ends, the others do within a minute;
# where one left with 75, 76, 77 or 134, all start again after 30 s (PAUSE), 20 times in a row at most (RESTARTS): a run of
# an hour (LONG, in seconds) begins a new row.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"

usage() { sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; }

case ${1:-} in -h | --help) usage && exit 0 ;; esac
[[ $# -gt 0 && $1 != -* ]] || fail "no hosts: expected launch/hosts.sh HOST1,HOST2,… -- --config=FILE --workdir=DIR"
IFS=, read -r -a hosts <<<"$1"
shift
folder=ivideo port=8476
rest=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --folder=*) folder=${1#*=} ;;
    --port=*) port=${1#*=} ;;
    --dry_run) export DRY_RUN=1 ;;
    --) shift && rest=("$@") && break ;;
    *) fail "'$1' is unknown: expected --folder=, --port=, --dry_run, and -- before the arguments of ivideo.main" ;;
  esac
  shift
done
[[ $port =~ ^[0-9]+$ ]] || fail "--port=$port: expected a number, such as 8476"
[[ ${#rest[@]} -gt 0 ]] || fail "no arguments of ivideo.main: give them after --, such as -- --config=configs/ssr2.py --workdir=DIR"

once() { # every host's process; ends with the first code that is not 0, the gravest first
  local i pids=() worst=0 code
  for i in "${!hosts[@]}"; do
    local process=(.venv/bin/python -m ivideo.main "--coordinator=${hosts[0]}:$port" "--num_processes=${#hosts[@]}" "--process_id=$i" "${rest[@]}")
    # -tt: should this script end, so do the processes. With exit, the shell there outlives the process: of one that a signal
    # ended, ssh itself would tell 255, the shell tells which signal
    local command=(ssh -tt -o BatchMode=yes "${hosts[i]}" "cd $(quoted "$folder") && $(quoted "${process[@]}"); exit \$?")
    if [[ -n ${DRY_RUN:-} ]]; then
      run "${command[@]}"
    else
      (set -o pipefail && "${command[@]}" 2>&1 | sed "s/^/${hosts[i]}: /") &
      pids+=($!)
    fi
  done
  for i in "${pids[@]}"; do
    code=0
    wait "$i" || code=$?
    # A process that was killed has another code than those that it left alone; these can go on
    if [[ $code != 0 ]] && { [[ $worst == 0 ]] || ! can_go_on "$worst"; }; then worst=$code; fi
  done
  return "$worst"
}

DRY_RUN_ONCE=${DRY_RUN:-}
if [[ -n $DRY_RUN_ONCE ]]; then once; else
  # The signal goes to this script too, which must not answer it again
  trap 'trap "" INT TERM; kill 0; exit 143' INT TERM
  run() { "$@"; }
  again once
fi
