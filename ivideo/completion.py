"""Completion of the command line in bash, and in zsh with its bashcompinit."""

import pathlib
import re
from collections.abc import Iterable

from absl import flags

from ivideo import modes, recipe
from ivideo.config_files import load_config, package_config_names, package_configs

# Bash splits a word at = and :, and replaces only what comes after the last of them. COMP_LINE has the word whole
_SCRIPT = r"""
_ivideo() {
  local line=${COMP_LINE:0:COMP_POINT} mode=train words=
  local word=${line##* }
  COMPREPLY=()
  [[ $line == *ivideo.main* ]] || return 0
  [[ $line =~ --mode[=\ ]([a-z_]+) ]] && mode=${BASH_REMATCH[1]}
  case $word in
@VALUES@
    --config=*:*) case ${word#--config=} in
@VARIANTS@
      esac ;;
    --config=*) words="@CONFIGS@" ;;
    --config.stages.*) words="@STAGE_KEYS@" ;;
    --config.*) words="--config.stages. @KEYS@" ;;
    --*=*) ;;
    -*) case $mode in
@FLAGS@
      esac ;;
  esac
  local kept= found mark
  for mark in = :; do
    [[ $COMP_WORDBREAKS == *$mark* && $word == *$mark* ]] || continue
    found=${word%"$mark"*}$mark
    (( ${#found} > ${#kept} )) && kept=$found
  done
  for found in $(compgen -W "$words" -- "$word"); do
    [[ $found == "$kept" ]] || COMPREPLY+=("${found#"$kept"}")
  done
  [[ ${COMPREPLY[0]-} == *[=.] ]] && compopt -o nospace 2>/dev/null
  return 0
}
complete -o default -F _ivideo python python3 python3.11 python3.12 python3.13
""".lstrip()


def script(own: Iterable[flags.Flag]) -> str:
    """The shell's script that completes modes, flags, their values, config files, their variants and keys.

    `own`: the package's flags.
    """
    known = {flag.name: flag for flag in own}
    variants = {name: [*found, *(f"{one}_distilled" for one in found)] for name, found in _variants().items()}
    stages = list(load_config("configs/cascade.py").order)
    keys = list(recipe.flat(load_config("configs/ssr1.py")))
    parts = {
        "VALUES": "\n".join(
            f'    --{name}=*) words="{_words(f"--{name}=", flag.parser.enum_values)}" ;;'
            for name, flag in known.items()
            if isinstance(flag.parser, flags.EnumParser)
        ),
        "VARIANTS": "\n".join(
            f'      *{name}:*) words="{_words("${word%%:*}:", found)}" ;;' for name, found in variants.items()
        ),
        "CONFIGS": _words("--config=configs/", variants),
        "STAGE_KEYS": " ".join(_words(f"--config.stages.{stage}.", keys, "=") for stage in stages),
        "KEYS": _words("--config.", keys, "="),
        "FLAGS": "\n".join(
            f'        {mode}) words="{" ".join(_written(known.get(name), name) for name in modes.read_by(mode))}" ;;'
            for mode in modes.MODES
        ),
    }
    return re.sub("@([A-Z_]+)@", lambda found: parts[found[1]], _SCRIPT)


def _words(before: str, choices, after: str = "") -> str:
    return " ".join(f"{before}{choice}{after}" for choice in choices)


def _written(flag, name: str) -> str:
    """A flag as one writes it. `flag` is None for --config, which is defined when it is parsed."""
    if flag is not None and flag.boolean:
        return f"--{name}"
    return f"--{name}=" if name != "config" else "--config= --config."


def _variants() -> dict[str, list[str]]:
    """Per config file its variants: the names of its public functions. The cascade has those of the base."""
    found = {
        name: re.findall(r"^def (?!get_config)([a-z]\w*)\(", pathlib.Path(package_configs(), name).read_text(), re.M)
        for name in package_config_names()
    }
    return {name: names or found["base.py"] for name, names in found.items()}
