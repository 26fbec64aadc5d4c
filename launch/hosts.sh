#!/usr/bin/env bash
# One training run on several machines that are reached by ssh and share a disk: one process a machine.
#
#   launch/hosts.sh HOST1,HOST2,… [--folder=ivideo] [--port=PORT] [--dry_run] -- --config=configs/ssr2.py --workdir=DIR …
#
# HOST is a name that ssh knows, or USER@HOST. The others find the first host by its name, without the user, at --port. Unless
# given, the port is a number from 20000 to 29999 that follows from the --workdir: the same whenever this run starts again,
# another for another run. --folder is the checkout on every host, from the home folder there, with an environment in .venv.
#
# Each line of output begins with its host. Where one process ends, the others do within a minute; one that is still there after
# 300 s (LEAVE) is ended. Where a process left with 75, 76, 77 or 134, and none with 1, 2 or 130 (an error that would be made
# again, Ctrl-C), all start again after 30 s (PAUSE), 20 times in a row at most (RESTARTS): a run of an hour (LONG, in seconds)
# begins a new row.
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
  [[ " ${names[*]-} " != *" $name "* ]] || fail "hosts '$1': $name is there twice; one process runs on each host"
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

workdir() { # the value of --workdir, or of an argument that says nothing of it all of them
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

there=$(quoted "$folder")
# A shell does not look for a home folder in what is quoted
if [[ $folder =~ ^(~[A-Za-z0-9._-]*)(/(.*))?$ ]]; then
  there=${BASH_REMATCH[1]}${BASH_REMATCH[2]:+/}
  [[ -z ${BASH_REMATCH[3]-} ]] || there+=$(quoted "${BASH_REMATCH[3]}")
fi

grave() { # how grave an exit code is; a process that was killed has another one than those that it left alone, which can go on
  if is_final "$1"; then echo 3; elif can_go_on "$1"; then echo 2; elif [[ $1 != 0 ]]; then echo 1; else echo 0; fi
}

named() { # every line with a name before it, at once: sed would keep pages of them back where the output is not a terminal
  local line
  while IFS= read -r line || [[ -n $line ]]; do printf '%s: %s\n' "$1" "$line"; done
}

late() { # ends what is still there LEAVE seconds after the first of some processes has ended: one on a host that hangs
  local pid there=1
  trap 'kill "$!" 2>/dev/null; exit' TERM
  while [[ $there == 1 ]]; do
    sleep 1 & wait $!
    for pid in "$@"; do kill -0 "$pid" 2>/dev/null || there=0; done
  done
  sleep "${LEAVE:-300}" & wait $!
  # Ends ssh. The shell on that host is then told that its terminal is gone
  kill "$@" 2>/dev/null || true
}

once() { # every host's process; ends with the first code that is not 0, the gravest first
  local i pids=() worst=0 code watcher=''
  for i in "${!hosts[@]}"; do
    local process=(.venv/bin/python -m ivideo.main "--coordinator=${names[0]}:$port" "--num_processes=${#hosts[@]}" "--process_id=$i" "${rest[@]}")
    # -tt: should this script end, so do the processes. With exit, the shell there outlives the process: of one that a signal
    # ended, ssh itself would tell 255, the shell tells which signal
    local command=(ssh -tt -o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=8 "${hosts[i]}" "cd $there && $(quoted "${process[@]}"); exit \$?")
    if [[ -n ${DRY_RUN:-} ]]; then
      run "${command[@]}"
    else
      "${command[@]}" > >(named "${hosts[i]}") 2>&1 &
      pids+=($!)
    fi
  done
  if [[ ${#pids[@]} -gt 0 ]]; then
    late "${pids[@]}" >/dev/null 2>&1 & # it must not hold a pipe open that somebody reads to its end
    watcher=$!
  fi
  for i in "${pids[@]}"; do
    code=0
    wait "$i" || code=$?
    if (($(grave "$code") > $(grave "$worst"))); then worst=$code; fi
  done
  [[ -z $watcher ]] || kill "$watcher" 2>/dev/null || true
  return "$worst"
}

DRY_RUN_ONCE=${DRY_RUN:-}
if [[ -n $DRY_RUN_ONCE ]]; then once; else
  # The signal goes to this script too, which must not answer it again
  trap 'trap "" INT TERM; kill 0; exit 143' INT TERM
  run() { "$@"; }
  again once
fi
