r"""ivideo: text to video with the cascade of diffusion models of Imagen Video (arXiv 2210.02303).

  python -m ivideo.main --config=configs/base.py:demo --mode=sample \
      --prompt="a yellow star moving right on a teal background" --out=star.mp4

--config names a config file, and after a colon its variant: paper (the default), demo or small. --config.KEY=VALUE sets
any value in it. A variant with _distilled is the last student of its distillation (demo_distilled), and with a phase's
name the student of that phase (demo_distilled_16). Of a cascade it is the students of all stages, or of the named ones
(demo_distilled=base,ssr1).
"""

import contextlib
import logging
import os
import re
import signal
import sys

from absl import flags

from ivideo import options
from ivideo.arguments import parse
from ivideo.config_files import EXAMPLE
from ivideo.errors import UserError
from ivideo.modes import COMMON, MODES, read_by, unread

FLAGS = flags.FLAGS


def run() -> None:
    """Runs the mode that the flags ask for, alone or as one of several processes."""
    config = FLAGS.config
    if config is None and MODES[FLAGS.mode].config:
        raise UserError(f"--config is missing: {EXAMPLE}")
    _check_flags()
    address = (FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    if not FLAGS.distributed and all(value is None for value in address):
        _run_mode(config, several=False)
        return
    if FLAGS.mode == "serve":
        raise UserError(
            "mode serve runs as one process, on all devices of one machine: leave out --distributed, --coordinator, "
            "--num_processes and --process_id"
        )
    from ivideo.devices import agreeing, hosts, joining

    joining.join(*address, run=FLAGS.workdir or "")
    with hosts.exiting_together():
        values = {} if config is None else agreeing.config_values(config)
        agreeing.agree(lambda: _shared_flags() | values | agreeing.program_values())
        _run_mode(config, several=True)


def _check_flags() -> None:
    """UserError for the first flag that --mode does not read: it would change nothing."""
    if ignored := unread(FLAGS.mode, [flag.name for flag in options.own() if flag.present]):
        known = ", ".join(f"--{name}" for name in read_by(FLAGS.mode) if name not in COMMON)
        raise UserError(f"mode {FLAGS.mode} does not read --{ignored[0]}: leave it out. It reads {known}")


def _shared_flags() -> dict:
    """The flags that must be the same in all processes."""
    return {f"--{flag.name}": flag.value for flag in options.own() if flag.name not in options.PER_PROCESS}


def _run_mode(config, several: bool) -> None:
    """Runs --mode. Each mode imports its own modules, so that --help answers at once."""
    _set_compilation_cache(several)
    if FLAGS.mode == "goodput":
        from ivideo.training.goodput import report

        report(_needed("workdir"), as_json=FLAGS.json)
        return
    if FLAGS.mode == "show":
        from ivideo.sampling import recipes

        recipes.show(_needed("input"), as_json=FLAGS.json)
        return
    if FLAGS.mode == "doctor":
        from ivideo.planning.doctor import doctor

        doctor(config, compile_cache=_compile_cache(), as_json=FLAGS.json)
        return
    if FLAGS.mode == "completion":
        from ivideo.completion import script

        print(script(options.own()), end="")
        return
    if FLAGS.mode == "replay":
        from ivideo.sampling.replay import replay

        with _exit_on_signal(several):
            replay(
                _needed("input"), clip=FLAGS.clip, workdir=FLAGS.workdir, weights_path=FLAGS.weights, out=FLAGS.out,
                overwrite=FLAGS.overwrite, as_json=FLAGS.json,
            )  # fmt: skip
        return
    from ivideo import checks
    from ivideo.sampling import cascade

    checks.expand_home(config)
    checks.check(config)
    cascade.select(config)
    if cascade.is_cascade(config) and FLAGS.mode not in ("sample", "serve", "evaluate", "describe"):
        raise UserError(
            f"mode {FLAGS.mode} needs one stage, not a cascade: use its own config, such as --config=configs/ssr2.py"
        )
    if FLAGS.mode in ("train", "benchmark", "distill"):
        checks.check_original(config)
    if FLAGS.only_check_args:  # a flag of absl
        return
    if FLAGS.mode == "train":
        from ivideo.training.loop import train

        if FLAGS.weights:
            _set_start(FLAGS.weights, config)
        evaluate = None
        if config.train.evaluate_every:
            from ivideo.evaluation.in_training import evaluator

            evaluate = evaluator(config, _needed("workdir"))
        train(config, _needed("workdir"), profile_steps=_profile_steps(), evaluate=evaluate)
    elif FLAGS.mode == "distill":
        from ivideo.training.phases import distill

        distill(config, _needed("teacher"), _needed("workdir"), profile_steps=_profile_steps())
    elif FLAGS.mode == "check_data":
        from ivideo.data.check import check_data
        from ivideo.training.loop import data_source, image_source

        check_data(data_source(config), image_source(config))
    elif FLAGS.mode == "show_data":
        from ivideo.training.showing import show_data

        show_data(config, _needed("out"), overwrite=FLAGS.overwrite)
    elif FLAGS.mode == "prepare_data":
        from ivideo import text
        from ivideo.data.preparing.prepare import prepare

        is_too_long = text.caption_check(config.text) if config.prepare.long_captions == "drop" else None
        spread = None
        if FLAGS.beam is not None:
            from ivideo.data.preparing import beam

            spread = beam.spread(FLAGS.beam, _needed("out"))
        prepare(config, _needed("input"), _needed("out"), is_too_long=is_too_long, spread=spread)
    elif FLAGS.mode == "sample":
        from ivideo.sampling.generate import generate

        with _exit_on_signal(several):
            generate(
                config, _prompts(), _needed("out"), workdir=FLAGS.workdir, weights_path=FLAGS.weights, seed=FLAGS.seed,
                num_videos=FLAGS.num_videos, same_noise=FLAGS.same_noise, in_folder=FLAGS.prompts_file is not None,
                zoom=FLAGS.zoom, overwrite=FLAGS.overwrite, resume=FLAGS.resume, from_stage=FLAGS.from_stage,
                to_stage=FLAGS.to_stage, input_path=FLAGS.input, save_stages=FLAGS.save_stages,
                with_recipe=FLAGS.metadata == "recipe", blocked_words=FLAGS.blocked_words,
                video_filter=FLAGS.video_filter,
            )  # fmt: skip
    elif FLAGS.mode == "serve":
        from ivideo.serving.page import serve

        serve(
            config, port=FLAGS.port, share=FLAGS.share, workdir=FLAGS.workdir, weights_path=FLAGS.weights,
            from_stage=FLAGS.from_stage, to_stage=FLAGS.to_stage, blocked_words=FLAGS.blocked_words,
            video_filter=FLAGS.video_filter,
        )  # fmt: skip
    elif FLAGS.mode == "evaluate":
        from ivideo.evaluation.distillation import evaluate_phases
        from ivideo.evaluation.evaluate import evaluate
        from ivideo.training import students

        with _exit_on_signal(several):
            if FLAGS.vbench:
                from ivideo.evaluation.vbench import lay_out

                prompts = _prompts() if FLAGS.prompts_file else ()
                lay_out(_needed("samples"), FLAGS.vbench, prompts=prompts, overwrite=FLAGS.overwrite)
                return
            if FLAGS.reference or FLAGS.samples:
                from ivideo.evaluation.quality import evaluate_quality

                evaluate_quality(
                    config, _needed("out"), reference=FLAGS.reference, samples=FLAGS.samples, clips=FLAGS.clips,
                    prompts_file=FLAGS.prompts_file, workdir=FLAGS.workdir, weights_path=FLAGS.weights,
                    seed=FLAGS.seed, to_stage=FLAGS.to_stage, as_json=FLAGS.json, overwrite=FLAGS.overwrite,
                )  # fmt: skip
                return
            if FLAGS.prompts_file:
                raise UserError(f"--prompts_file={FLAGS.prompts_file} is read with --reference or --samples: give one")
            clips = FLAGS.clips or 96
            if not cascade.is_cascade(config) and not config.phase and students.is_distillation(FLAGS.workdir or ""):
                evaluate_phases(
                    config, FLAGS.workdir, clips=clips, seed=FLAGS.seed, out=FLAGS.out, as_json=FLAGS.json,
                    overwrite=FLAGS.overwrite,
                )  # fmt: skip
                return
            evaluate(
                config, workdir=FLAGS.workdir, weights_path=FLAGS.weights, clips=clips, seed=FLAGS.seed,
                out=FLAGS.out, as_json=FLAGS.json, overwrite=FLAGS.overwrite, to_stage=FLAGS.to_stage,
            )  # fmt: skip
    elif FLAGS.mode == "export":
        from ivideo.training.trained import export

        export(config, _needed("workdir"), _needed("out"), overwrite=FLAGS.overwrite)
    elif FLAGS.mode == "encode_text":
        if FLAGS.beam is not None:
            from ivideo.text import beam

            beam.encode_captions(config, _needed("captions"), _needed("out"), shards=FLAGS.shards, options=FLAGS.beam)
        else:
            from ivideo.text.cache import encode_captions

            encode_captions(config, _needed("captions"), _needed("out"))
    elif FLAGS.mode == "train_text":
        from ivideo.training.pretrain_text import train_text

        train_text(config, _needed("out"), overwrite=FLAGS.overwrite)
    elif FLAGS.mode == "describe":
        from ivideo.planning.describe import describe

        describe(config, as_json=FLAGS.json)
    elif FLAGS.mode == "compile":
        from ivideo.planning.compile import compile_stage

        compile_stage(
            config, _needed("topology"), what=FLAGS.what, effort=FLAGS.effort, as_json=FLAGS.json, out=FLAGS.out,
            overwrite=FLAGS.overwrite,
        )  # fmt: skip
    elif FLAGS.mode == "benchmark":
        from ivideo.planning.benchmark import benchmark

        benchmark(config, as_json=FLAGS.json)


def _set_compilation_cache(several: bool) -> None:
    """Makes jax keep compiled programs on disk for the next run of the same program."""
    import jax

    folder = _compile_cache()
    if not folder or jax.config.jax_compilation_cache_dir or FLAGS.mode == "compile":
        return
    # Only the first of several processes writes to the cache, so only it finds its program there and starts early. On
    # CPUs it then times out waiting for the others to compile; accelerators wait longer
    if not (several and jax.default_backend() == "cpu"):
        jax.config.update("jax_compilation_cache_dir", folder)


def _compile_cache() -> str:
    """The folder for compiled programs; empty for none."""
    if FLAGS.compile_cache is not None:
        return FLAGS.compile_cache
    folder = os.path.expanduser("~/.cache/ivideo")
    return "" if folder.startswith("~") else folder  # a container's user may have no entry in /etc/passwd


def _profile_steps() -> tuple[int, int] | None:
    if FLAGS.profile_steps is None:
        return None
    found = re.fullmatch(r"(\d+),(\d+)", FLAGS.profile_steps)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--profile_steps={FLAGS.profile_steps}: expected the first and the last step, such as 10,15")
    return int(found[1]), int(found[2])


def _needed(name: str) -> str:
    value = getattr(FLAGS, name)
    if not value:
        raise UserError(f"--{name} is missing: mode {FLAGS.mode} needs it")
    return value


def _prompts() -> list[str]:
    """The prompts from the flags. An empty --prompt is valid (no text); no prompt at all is an error."""
    if (FLAGS.prompt is None) == (FLAGS.prompts_file is None):
        raise UserError(
            'mode sample needs one of --prompt="…" and --prompts_file=FILE; --prompt="" samples without text'
        )
    if FLAGS.prompt is not None:
        return [FLAGS.prompt]
    from ivideo.prompts import read_lines

    return list(read_lines(FLAGS.prompts_file, "--prompts_file"))


def _set_start(path: str, config) -> None:
    """Sets config.train.start, the weights that a new training run starts from, to --weights."""
    from ivideo.training import trained

    if config.train.start:
        raise UserError(f"--weights={path} and config.train.start = {config.train.start} are both given: give one")
    config.train.start = trained.find([config], weights=path)[config.stage]


@contextlib.contextmanager
def _exit_on_signal(several: bool):
    """Inside the block, Ctrl-C and similar signals end the program at once. Of several processes jax handles them."""
    if several:
        yield
        return
    from ivideo.sampling import interrupts

    try:
        with interrupts.raise_on_signal():
            yield
    except interrupts.Interrupted as e:
        interrupts.exit_now(e)


def _open_streams() -> None:
    """Redirects standard streams that the shell closed, as `2>&-` does, to /dev/null.

    Otherwise the next file that is opened, perhaps a checkpoint, gets the stream's number, and the libraries' output is
    written into it.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(number, True)
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit code: 0, or 2 after an error that the user can fix (one line)."""
    _open_streams()
    # Do not fail on a character, as in a file name or a table, that the terminal's encoding lacks
    sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("ivideo").setLevel(logging.INFO)
    for name in ("absl", "asyncio"):  # Orbax logs pages, even for errors that it raises too
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        parse(sys.argv if argv is None else argv, about=__doc__)
        run()
    except BrokenPipeError:  # the reader of stdout, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (UserError, FloatingPointError, OSError) as e:
        with contextlib.suppress(OSError):  # the terminal is gone; the exit code remains
            print(f"ivideo: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ivideo: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
