r"""ivideo: text to video by the cascade of Imagen Video (arXiv 2210.02303).

train      train a stage in --workdir; the same command again goes on from its newest checkpoint
sample     write videos for --prompt or --prompts_file to --out
evaluate   score prompt-following on the captioned shapes, seen and held-out captions
export     write the averaged weights of --workdir as a safetensors file to --out
encode_text embed the texts of --captions once, for training: to the folder --out (config.data.text_cache)
train_text train the small text encoder that the demo cascade ships; write it to --out
compile    compile a stage for a TPU slice that is not there (--topology): memory, FLOPs, communication, a roofline
check_data read every clip of the data set as the stage would, and list those that cannot be read
goodput    where the time of the training run in --workdir went
describe   print what a stage is: parameters, sizes, FLOPs, layers; nothing is allocated
benchmark  time a stage's forward, training step and guided sampling step on this machine

  python -m ivideo.main --config=configs/base.py:demo --mode=sample \
      --prompt="a yellow star moving right on a teal background" --out=star.mp4

A config is a file, a variant of it after a colon (paper, demo, small), and any of its values as --config.KEY=VALUE.
A variant with _distilled is the last student of its distillation (demo_distilled), and with a phase's name the student
of that phase (demo_distilled_16); of the cascade's stages all, or those named (demo_distilled=base,ssr1).
"""

import contextlib
import logging
import os
import re
import signal
import sys

from absl import flags

from ivideo.arguments import EXAMPLE, PATH, parse
from ivideo.errors import UserError

MODES = (
    "train",
    "sample",
    "evaluate",
    "export",
    "encode_text",
    "train_text",
    "describe",
    "benchmark",
    "compile",
    "goodput",
    "check_data",
)
# Flags that may differ between the processes of one run: the config is compared by its values
OF_A_PROCESS = (
    "config", "coordinator", "process_id", "workdir", "out", "captions", "prompts_file", "input", "compile_cache",
)  # fmt: skip
FLAGS = flags.FLAGS

flags.DEFINE_string(
    "config", None, "A stage's config file, as configs/base.py or configs/base.py:demo, of yours or of the package.",
    allow_override=True,
)  # fmt: skip
flags.DEFINE_enum("mode", "train", MODES, "What to do; see above.")
flags.DEFINE(
    PATH, "workdir", None, "Folder of a training run: checkpoints, metrics.jsonl, TensorBoard. Sampling without it "
    "takes the weights in the package (variant demo).",
)  # fmt: skip
flags.DEFINE(
    PATH, "weights", None, "Weights from mode export, in place of --workdir: a .safetensors file of one stage, or "
    "a folder of STAGE.safetensors. In mode train a new run begins with them.",
)  # fmt: skip
flags.DEFINE_string("prompt", None, 'What the video shows. An empty one, --prompt="", samples without text.')
flags.DEFINE(
    PATH, "prompts_file", None, "A UTF-8 file with one prompt per line; --out is then a folder of 000.mp4, 001.mp4, …"
)
flags.DEFINE(
    PATH,
    "out",
    None,
    "The file to write: .mp4 or .gif in mode sample, .safetensors in export, .json in evaluate and compile.",
)
flags.DEFINE(PATH, "captions", None, "A text file with a caption a line, for mode encode_text.")
flags.DEFINE_multi_string(
    "beam",
    None,
    "Makes mode encode_text run by Apache Beam, with its options, one a flag: --beam=--runner=DirectRunner.",
)
flags.DEFINE_integer("shards", 256, "Files of the cache that --beam makes.", lower_bound=1)
flags.DEFINE_integer(
    "seed", 0, "Seed of the sampling noise. The same seed and prompt give the same video.", lower_bound=0,
    upper_bound=2**64 - 1,
)  # fmt: skip
flags.DEFINE_integer("num_videos", 1, "Videos per prompt; more than one makes --out a folder.", lower_bound=1)
flags.DEFINE_bool("same_noise", False, "Start the videos of all prompts from the same noise, to compare prompts.")
flags.DEFINE_bool(
    "resume", False, "Mode sample: keep the videos that an earlier run of the same command has written, and make those "
    "that are missing.",
)  # fmt: skip
flags.DEFINE(PATH, "input", None, "A video file that the first stage, one of super-resolution, enlarges.")
flags.DEFINE_string("from_stage", None, "With configs/cascade.py: the first stage to run; it needs --input.")
flags.DEFINE_string("to_stage", None, "With configs/cascade.py: the last stage to run.")
flags.DEFINE_bool("save_stages", False, "Write what every stage makes beside --out, as out.base.mp4, out.tsr1.mp4, …")
flags.DEFINE_integer("zoom", 1, "Enlarge every pixel of a written video, to look at small stages.", lower_bound=1)
flags.DEFINE_bool("overwrite", False, "Replace what is at --out.")
flags.DEFINE_bool("json", False, "Print JSON (modes describe, benchmark, evaluate).")
flags.DEFINE_string("topology", None, "The TPU slice that mode compile compiles for, such as v5e:4x4 or v5p:4x4x4.")
flags.DEFINE_enum(
    "what",
    "train",
    ("train", "sample", "text"),
    "What mode compile compiles: a step of either, or the text encoder.",
)
flags.DEFINE_float(
    "effort", -1.0, "How hard mode compile's compiler tries for speed: -1 takes minutes, 0 is what runs on TPUs take."
)
flags.DEFINE_string("profile_steps", None, "Steps of mode train to profile for xprof, as 10,15: to WORKDIR/profile.")
flags.DEFINE(
    PATH, "compile_cache", None, "Folder where compiled programs are kept for the next run, ~/.cache/ivideo unless "
    "given; empty: none. JAX_COMPILATION_CACHE_DIR goes before it.",
)  # fmt: skip
flags.DEFINE_bool(
    "distributed", False, "One of several processes of a TPU pod, GKE or Slurm, which tell where they are."
)
flags.DEFINE_string("coordinator", None, "HOST:PORT of the first of several processes elsewhere; with the next two.")
flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1)
flags.DEFINE_integer("process_id", None, "Which one this is, from 0.", lower_bound=0)
flags.DEFINE_integer("clips", 96, "Clips that mode evaluate samples, half of them of held-out captions.", lower_bound=2)


def run() -> None:
    """Does what the flags say, with other processes where they say so."""
    config = FLAGS.config
    if config is None:
        raise UserError(f"--config is missing: {EXAMPLE}")
    addressed = (FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    if not FLAGS.distributed and all(value is None for value in addressed):
        _run_mode(config, several=False)
        return
    from ivideo.devices import agreeing, hosts, joining

    joining.join(*addressed, run=FLAGS.workdir or "")
    with hosts.exiting_together():
        agreeing.agree(lambda: _said() | agreeing.config_values(config) | agreeing.program_values())
        _run_mode(config, several=True)


def _said() -> dict:
    """The flags that have to be the same in several processes."""
    flags_here = FLAGS.get_key_flags_for_module(sys.modules[__name__])
    return {f"--{flag.name}": flag.value for flag in flags_here if flag.name not in OF_A_PROCESS}


def _run_mode(config, several: bool) -> None:
    """Does what --mode says. Imports follow the mode, so that --help answers at once."""
    _keep_compiled(several)
    if FLAGS.mode == "goodput":
        from ivideo.training.goodput import report

        report(_needed("workdir"), as_json=FLAGS.json)
        return
    from ivideo import checks
    from ivideo.sampling import cascade

    checks.expand_home(config)
    checks.check(config)
    cascade.select(config)
    if cascade.is_cascade(config) and FLAGS.mode not in ("sample", "evaluate", "describe"):
        raise UserError(f"mode {FLAGS.mode} is of one stage: use its own config, such as --config=configs/ssr2.py")
    if FLAGS.mode in ("train", "benchmark"):
        checks.check_original(config)
    if FLAGS.only_check_args:  # one of absl's own flags
        return
    if FLAGS.mode == "train":
        from ivideo.training.loop import train

        if FLAGS.weights:
            _start_with(FLAGS.weights, config)
        train(config, _needed("workdir"), profile_steps=_profile_steps())
    elif FLAGS.mode == "check_data":
        from ivideo.data.check import check_data
        from ivideo.training.loop import data_source

        check_data(data_source(config))
    elif FLAGS.mode == "sample":
        from ivideo.sampling.generate import generate

        with _leaving_at_once(several):
            generate(
                config, _prompts(), _needed("out"), workdir=FLAGS.workdir, weights_path=FLAGS.weights, seed=FLAGS.seed,
                num_videos=FLAGS.num_videos, same_noise=FLAGS.same_noise, in_folder=FLAGS.prompts_file is not None,
                zoom=FLAGS.zoom, overwrite=FLAGS.overwrite, resume=FLAGS.resume, from_stage=FLAGS.from_stage,
                to_stage=FLAGS.to_stage, input_path=FLAGS.input, save_stages=FLAGS.save_stages,
            )  # fmt: skip
    elif FLAGS.mode == "evaluate":
        from ivideo.evaluation.evaluate import evaluate

        with _leaving_at_once(several):
            evaluate(
                config, workdir=FLAGS.workdir, weights_path=FLAGS.weights, clips=FLAGS.clips, seed=FLAGS.seed,
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


def _keep_compiled(several: bool) -> None:
    """Compiled programs are kept on disk, by jax, for the next run of the same program."""
    import jax

    folder = os.path.expanduser("~/.cache/ivideo") if FLAGS.compile_cache is None else FLAGS.compile_cache
    homeless = folder.startswith("~")  # the user of a container, without an entry in its list of users
    if not folder or homeless or jax.config.jax_compilation_cache_dir or FLAGS.mode == "compile":
        return
    # jax lets the first of several processes alone write. On CPUs one that finds its program there does not wait long
    # enough for the others to compile theirs; chips wait
    if not (several and jax.default_backend() == "cpu"):
        jax.config.update("jax_compilation_cache_dir", folder)


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
    """The prompts of the command line. An empty prompt is a wish, no prompt a mistake."""
    if (FLAGS.prompt is None) == (FLAGS.prompts_file is None):
        raise UserError(
            'mode sample needs one of --prompt="…" and --prompts_file=FILE; --prompt="" samples without text'
        )
    if FLAGS.prompt is not None:
        return [FLAGS.prompt]
    from ivideo.prompts import read_lines

    return list(read_lines(FLAGS.prompts_file, "--prompts_file"))


def _start_with(path: str, config) -> None:
    """Makes a new training run begin with the weights that --weights names."""
    from ivideo.training import trained

    if config.train.start:
        raise UserError(f"--weights={path} and config.train.start = {config.train.start} are both given: give one")
    config.train.start = trained.find([config], weights=path)[config.stage]


@contextlib.contextmanager
def _leaving_at_once(several: bool):
    """Within it Ctrl-C and other signals to stop end the program at once. Of several processes jax has the signals."""
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
    """Opens the standard streams that the shell closed, as `2>&-` does, to nowhere.

    Else the next file that is opened, a checkpoint's perhaps, has their number, and what libraries print goes into it.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(number, True)
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 after an error that the user can mend, printed as one line."""
    _open_streams()
    # A file name, or a sign in a table, that the terminal's encoding lacks is no reason to fail
    sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("ivideo").setLevel(logging.INFO)
    for name in ("absl", "asyncio"):  # Orbax writes pages there, also of errors that it raises
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        parse(sys.argv if argv is None else argv)
        run()
    except BrokenPipeError:  # whoever reads the output has read enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (UserError, FloatingPointError, OSError) as e:
        with contextlib.suppress(OSError):  # the terminal is gone: the code tells
            print(f"ivideo: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ivideo: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
