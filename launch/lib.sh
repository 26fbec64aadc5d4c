# shellcheck shell=bash
# Shared functions of the scripts in this folder, to be sourced: one-line errors, dry runs, restarts.

fail() { # prints one line on stderr and exits with 2
  echo "$(basename "$0"): $*" >&2
  exit 2
}

usage() { # prints the comment at the top of the script
  sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'
}

needs() { # fails if program $1 is not installed; $2 says how to install it. A dry run needs no program
  [[ -n ${DRY_RUN:-} ]] || command -v "$1" >/dev/null || fail "$1 is not installed: $2"
}

is_number() { # whether $1 is an integer from $2 to $3 without leading zeros, which bash would read as octal
  [[ $1 =~ ^(0|[1-9][0-9]{0,8})$ ]] && (($1 >= $2 && $1 <= $3))
}

run() { # runs a command, or in a dry run prints it, quoted for a shell
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "$@" | sed 's/ $//'
    printf '\n'
  else
    "$@"
  fi
}

# Exit codes of ivideo.main after which the same command continues: stopped and saved, a step hung, another process was lost,
# and 134 if jax ended the process because another one was lost (SIGABRT)
RESUMABLE=(75 76 77 134)
# Exit codes after which it must not restart: an error in the program, an error that the user can fix, Ctrl-C
FINAL=(1 2 130)

is_resumable() {
  [[ " ${RESUMABLE[*]} " == *" $1 "* ]]
}

is_final() {
  [[ " ${FINAL[*]} " == *" $1 "* ]]
}

again() { # runs a command, and restarts it after a resumable exit code, at most RESTARTS times in a row
  local left=${RESTARTS:-20} code start
  while true; do
    code=0 start=$SECONDS
    run "$@" || code=$?
    if ! is_resumable "$code"; then return "$code"; fi
    # Over weeks many machines fail. Only runs that end soon, one after the other, mean that restarting does not help
    if ((SECONDS - start >= ${LONG:-3600})); then left=${RESTARTS:-20}; fi
    if ((left-- == 0)); then
      echo "exit code $code after ${RESTARTS:-20} restarts in a row: giving up" >&2
      return "$code"
    fi
    echo "exit code $code: restarting in ${PAUSE:-30} s" >&2
    # A trap runs only after the foreground command has ended, so sleep runs in the background
    sleep "${PAUSE:-30}" &
    wait $!
  done
}

quoted() { # quotes the arguments for a remote shell, which may not understand bash's own quoting
  local word line=''
  for word in "$@"; do
    [[ -n $word && $word != *[!A-Za-z0-9_./:=,+@%-]* ]] || word="'${word//\'/\'\\\'\'}'"
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}
