# shellcheck shell=bash
# What the scripts of this folder share: errors of one line, dry runs, and running again what can go on. To be sourced.

fail() { # one line on stderr, and exit code 2
  echo "$(basename "$0"): $*" >&2
  exit 2
}

run() { # runs a command, or with --dry_run prints it as one could paste it
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "$@" | sed 's/ $//'
    printf '\n'
  else
    "$@"
  fi
}

# Exit codes of ivideo.main after which the same command goes on: told to stop, a step hung, another process was lost; 134
# where jax itself ended the process for that (SIGABRT).
can_go_on() {
  [[ $1 == 75 || $1 == 76 || $1 == 77 || $1 == 134 ]]
}

again() { # runs a command until it ends, up to RESTARTS times more in a row where it left with a code that can go on
  local left=${RESTARTS:-20} code start
  while true; do
    code=0 start=$SECONDS
    run "$@" || code=$?
    if ! can_go_on "$code"; then return "$code"; fi
    # In weeks many machines go away; that nothing goes on shows in runs that end soon, one after the other
    if ((SECONDS - start >= ${LONG:-3600})); then left=${RESTARTS:-20}; fi
    if ((left-- == 0)); then
      echo "left with $code once more, after ${RESTARTS:-20} restarts in a row: giving up" >&2
      return "$code"
    fi
    echo "left with $code: again in ${PAUSE:-30} s" >&2
    # A trap waits for what runs in the foreground to end
    sleep "${PAUSE:-30}" &
    wait $!
  done
}

quoted() { # the arguments as one line for a shell elsewhere
  printf '%q ' "$@" | sed 's/ $//'
}
