#!/usr/bin/env bash
# Runs ivideo.main on several machines over ssh, one process per machine. The machines must share a disk.
#
#   launch/hosts.sh HOST1,HOST2,… [--folder=ivideo] [--port=PORT] [--dry_run] -- --config=configs/ssr2.py --workdir=DIR …
#
# HOST is a name that ssh can resolve, or USER@HOST. The other hosts reach the first one by its name, without the user, at
# --port. The default port is a number from 20000 to 29999 that depends on --workdir: it stays the same when this run restarts,
# and differs from other runs. --folder is the checkout on every host, relative to the home folder, with an environment in .venv.
#
# Each line of output starts with its host. When one process ends, the others end within a minute; after 300 s (LEAVE) the script
# ends the rest. If a process exits with 75, 76, 77 or 134, and none with 1, 2 or 130 (an error that would happen again, or
# Ctrl-C), all processes restart after 30 s (PAUSE), at most 20 times in a row (RESTARTS). A run of an hour (LONG, in seconds)
# resets that count.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"

case ${1:-} in -h | --help) usage && exit 0 ;; esac
[[ $# -gt 0 && $1 != -* ]] || fail "no hosts: expected launch/hosts.sh HOST1,HOST2,… -- --config=FILE --workdir=DIR"
hosts=() names=()
while IFS= read -r host; do
  [[ $host =~ ^([A-Za-z0-9_][A-Za-z0-9._-]*@)?([A-Za-z0-9][A-Za-z0-9._-]*)$ ]] ||
    fail "hosts '$1': '$host' is not a host; expected names with a comma between them and no spaces, such as h1,h2 or me@h1,me@h2"
  name=${BASH_REMATCH[2]}
  [[ " ${names[*]-} " != *" $name "* ]] || fail "hosts '$1': $name appears twice; one process runs on each host"
  hosts+=("$host") names+=("$name")
done <<<"${1//,/$'\n'}"
shift
folder=ivideo port=auto
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
[[ -n $folder ]] || fail "--folder is empty: give the checkout's folder on every host, such as --folder=ivideo"
[[ ${#rest[@]} -gt 0 ]] || fail "no arguments of ivideo.main: give them after --, such as -- --config=configs/ssr2.py --workdir=DIR"

workdir() { # the value of --workdir; without it, all arguments
  local i
  for i in "${!rest[@]}"; do
    case ${rest[i]} in
      --workdir=*) echo "${rest[i]#*=}" && return ;;
      --workdir) echo "${rest[i + 1]-}" && return ;;
    esac
  done
  echo "${rest[*]}"
}

if [[ $port == auto ]]; then
  sum=$(workdir | cksum)
  port=$((20000 + ${sum%% *} % 10000))
fi
is_number "$port" 1 65535 || fail "--port=$port: expected a number from 1 to 65535, such as 8476"
needs ssh "install OpenSSH's client (on Debian and Ubuntu: apt install openssh-client)"

remote_folder=$(quoted "$folder")
# A shell does not expand ~ inside quotes
if [[ $folder =~ ^(~[A-Za-z0-9._-]*)(/(.*))?$ ]]; then
  remote_folder=${BASH_REMATCH[1]}${BASH_REMATCH[2]:+/}
  [[ -z ${BASH_REMATCH[3]-} ]] || remote_folder+=$(quoted "${BASH_REMATCH[3]}")
fi

severity() { # of an exit code, 0 to 3. A killed process and the processes that lose it exit with different codes
  if is_final "$1"; then echo 3; elif is_resumable "$1"; then echo 2; elif [[ $1 != 0 ]]; then echo 1; else echo 0; fi
}

prefixed() { # puts a name before every line at once; sed would buffer lines if the output is not a terminal
  local line
  while IFS= read -r line || [[ -n $line ]]; do printf '%s: %s\n' "$1" "$line"; done
}

end_late() { # ends the processes that still run LEAVE seconds after the first one has ended, as on a host that hangs
  local pid all_running=1
  trap 'kill "$!" 2>/dev/null; exit' TERM
  while [[ $all_running == 1 ]]; do
    sleep 1 & wait $!
    for pid in "$@"; do kill -0 "$pid" 2>/dev/null || all_running=0; done
  done
  sleep "${LEAVE:-300}" & wait $!
  # This ends ssh. The shell on the host then gets SIGHUP
  kill "$@" 2>/dev/null || true
}

once() { # runs one process per host; returns the most severe exit code
  local i pids=() worst=0 code watcher=''
  for i in "${!hosts[@]}"; do
    local process=(.venv/bin/python -m ivideo.main "--coordinator=${names[0]}:$port" "--num_processes=${#hosts[@]}" "--process_id=$i" "${rest[@]}")
    # -tt: the processes end when this script ends. The exit makes the remote shell outlive the process and return its code:
    # for a process that a signal ended, ssh itself would return 255
    local command=(ssh -tt -o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=8 "${hosts[i]}" "cd $remote_folder && $(quoted "${process[@]}"); exit \$?")
    if [[ -n ${DRY_RUN:-} ]]; then
      run "${command[@]}"
    else
      "${command[@]}" > >(prefixed "${hosts[i]}") 2>&1 &
      pids+=($!)
    fi
  done
  if [[ ${#pids[@]} -gt 0 ]]; then
    end_late "${pids[@]}" >/dev/null 2>&1 & # without our pipes, which a reader may wait for
    watcher=$!
  fi
  for i in "${pids[@]}"; do
    code=0
    wait "$i" || code=$?
    if (($(severity "$code") > $(severity "$worst"))); then worst=$code; fi
  done
  [[ -z $watcher ]] || kill "$watcher" 2>/dev/null || true
  return "$worst"
}

DRY_RUN_ONCE=${DRY_RUN:-}
if [[ -n $DRY_RUN_ONCE ]]; then once; else
  # kill 0 sends the signal to this script too, which must then ignore it
  trap 'trap "" INT TERM; kill 0; exit 143' INT TERM
  run() { "$@"; }
  again once
fi
