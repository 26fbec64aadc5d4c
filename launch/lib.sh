# shellcheck shell=bash
# What the scripts of this folder share: errors of one line, dry runs, and running again what can go on. To be sourced.

fail() { # one line on stderr, and exit code 2
  echo "$(basename "$0"): $*" >&2
  exit 2
}

usage() { # the head of the script
  sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'
}

needs() { # a program that the script cannot do without, and how one gets it; a dry run does without
  [[ -n ${DRY_RUN:-} ]] || command -v "$1" >/dev/null || fail "$1 is not installed: $2"
}

is_number() { # whether $1 is a whole number from $2 to $3, written without zeros in front: bash takes 010 for 8
  [[ $1 =~ ^(0|[1-9][0-9]{0,8})$ ]] && (($1 >= $2 && $1 <= $3))
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
GO_ON=(75 76 77 134)
# Those after which it would fail again, or is not wanted: an error in the program, one that a user can mend, Ctrl-C
FINAL=(1 2 130)

can_go_on() {
  [[ " ${GO_ON[*]} " == *" $1 "* ]]
}

is_final() {
  [[ " ${FINAL[*]} " == *" $1 "* ]]
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

quoted() { # the arguments as words for a shell elsewhere, of whatever kind: bash's own way to quote is not known to all
  local word line=''
  for word in "$@"; do
    [[ -n $word && $word != *[!A-Za-z0-9_./:=,+@%-]* ]] || word="'${word//\'/\'\\\'\'}'"
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}
