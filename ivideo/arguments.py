"""Parses the command line: loads the config, applies its overrides, expands paths, prints help."""

import difflib
import logging
import re
import sys

import ml_collections
from absl import app, flags
from ml_collections import config_flags

from ivideo import files, modes
from ivideo.config_files import EXAMPLE, load_config, one_line
from ivideo.errors import UserError

log = logging.getLogger("ivideo")
FLAGS = flags.FLAGS
HELP = re.compile(r"--?(h|help|helpshort|helpfull|helpxml|\?)")


class PathParser(flags.ArgumentParser):
    """Parses a path; a ~ at its start is the home folder, as in a shell."""

    def parse(self, argument: str) -> str:
        return files.expand_home(argument)

    def flag_type(self) -> str:
        return "path"


class IntegerParser(flags.IntegerParser):
    """Parses an integer, also written as 1e6."""

    def convert(self, argument: str) -> int:
        try:
            return super().convert(argument)
        except ValueError:
            if not re.fullmatch(r"[+-]?\d+(\.\d*)?[eE]\+?\d+", argument) or not float(argument).is_integer():
                raise ValueError("expected a whole number") from None
            return int(float(argument))


PATH = PathParser()
config_flags.register_flag_parser_for_type(int, IntegerParser())


def parse(argv: list[str], *, about: str = "") -> None:
    """Parses the flags into absl's FLAGS. FLAGS.config is the loaded config with its overrides.

    `about`: the first part of the help. Raises a one-line UserError for any mistake. With a help flag, prints the help
    and exits with 0.
    """
    app.define_help_flags()
    if help_flags := [arg for arg in argv[1:] if HELP.fullmatch(arg)]:
        _help(argv, help_flags[0], about)
    try:
        argv, spec = _split_config(FLAGS.read_flags_from_files(argv, force_gnu=False))
        if spec is not None:
            config = load_config(spec)
            _check_overrides(argv, config)
            config_flags.DEFINE_config_dict("config", config, sys_argv=argv, allow_override=True)
        rest = FLAGS(argv)
    except flags.UnrecognizedFlagError as e:
        if e.flagname.startswith("config."):
            raise UserError(f"--{e.flagname} is set, but there is no --config: {EXAMPLE}") from e
        raise UserError(f"--{e.flagname} is not a flag{_suggestion(e.flagname)}: see --helpshort") from e
    except UserError:
        raise
    except (flags.Error, AttributeError, LookupError, TypeError, ValueError) as e:
        raise UserError(one_line(e)) from e
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is not a flag: write flags as --name=value; see --helpshort")


def _split_config(argv: list[str]) -> tuple[list[str], str | None]:
    """Returns the arguments without --config, and the value of the last --config, after = or a space."""
    rest, specs = argv[:1], []
    arguments = iter(argv[1:])
    for arg in arguments:
        if arg == "--":
            rest += [arg, *arguments]
        elif re.fullmatch(r"--?config", arg):
            specs.append(next(arguments, ""))
        elif found := re.match(r"--?config=", arg):
            specs.append(arg[found.end() :])
        else:
            rest.append(arg)
    if not specs:
        return rest, None
    if not specs[-1]:
        raise UserError(f"--config has no value: {EXAMPLE}")
    if len(set(specs)) > 1:
        log.warning("--config is given %d times: using the last one, %s", len(specs), specs[-1])
    return rest, specs[-1]


def _check_overrides(argv: list[str], config) -> None:
    """UserError for the first --config.KEY whose key is not in the config."""
    for arg in argv:
        found = re.match(r"--?(?:no)?config\.([\w.]+)", arg)
        if found and not _has_key(config, found[1].split(".")):
            close = difflib.get_close_matches(found[1], list(_keys(config)), n=3, cutoff=0.4)
            near = f": similar keys are {', '.join(close)}" if close else ""
            raise UserError(f"the config has no key {found[1]} (--config.{found[1]}){near}")


def _has_key(node, names: list[str]) -> bool:
    for name in names:
        if not isinstance(node, ml_collections.ConfigDict) or name not in node:
            return False
        node = node[name]
    return True


def _keys(config, prefix: str = ""):
    for name, value in config.items():
        yield prefix + name
        if isinstance(value, ml_collections.ConfigDict):
            yield from _keys(value, f"{prefix}{name}.")


def _help(argv: list[str], flag: str, about: str):
    """Prints the help and exits with 0: an overview, or with --mode that mode's flags. --helpfull is absl's."""
    if flag.lstrip("-") in ("helpfull", "helpxml"):
        try:
            FLAGS([argv[0], flag])
        except SystemExit:  # absl exits with 1
            sys.exit(0)
    asked = re.findall(r"^--?mode[= ](.*)$", "\n".join(argv).replace("mode\n", "mode "), re.M)
    if asked and asked[-1] not in modes.MODES:
        raise UserError(f"--mode={asked[-1]} is unknown: expected one of {', '.join(modes.MODES)}")
    print(_help_of_mode(asked[-1]) if asked else f"{about}\n{modes.overview()}")
    sys.exit(0)


def _help_of_mode(name: str) -> str:
    mode = modes.MODES[name]
    parts = [f"--mode={name}: {mode.summary}"]
    own = [flag for flag in modes.read_by(name) if flag not in modes.COMMON]
    for title, names in (("Flags of this mode", own), ("Flags of all modes", set(modes.COMMON) - {"mode"})):
        if names:
            parts.append(f"{title}:\n" + "\n".join(map(_help_of_flag, sorted(names))))
    return "\n\n".join(parts)


def _help_of_flag(name: str) -> str:
    flag = FLAGS[name]
    written = f"--[no]{name}" if flag.boolean else f"--{name}"
    default = "" if flag.default in (None, False, "") else f" Default: {flag.default}."
    return flags.text_wrap(f"{written}: {flag.help}{default}", length=100, indent="      ", firstline_indent="  ")


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, list(FLAGS), n=1)
    return f", did you mean --{close[0]}?" if close else ""
