"""Mode completion: what bash offers after a line that a person has begun."""

import subprocess

import pytest

from configs import common
from ivideo import completion, main, modes, options

LINE = "python -m ivideo.main "
VARIANTS = ["paper", "demo", "colab", "small"]


@pytest.fixture(scope="module")
def script():
    return completion.script(options.own())


def completed(script, line, breaks="=:"):
    """The words that bash would put in the place of the last one, from its last = or : on if these break words."""
    end = 'COMP_WORDBREAKS=$2 COMP_LINE=$1 COMP_POINT=${#1}; _ivideo; printf "%s\\n" "${COMPREPLY[@]-}"'
    command = ["bash", "-c", f"set -u\n{script}\n{end}", "bash", line, breaks]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("--mo", ["--mode="]),
        ("--mode=sh", ["show", "show_data"]),
        ("--what=distill-", ["distill-guidance", "distill-round"]),
        ("--config=configs/s", ["configs/ssr1.py", "configs/ssr2.py", "configs/ssr3.py"]),
        ("--config=configs/base.py:c", ["colab", "colab_distilled"]),
        (
            "--config=configs/cascade.py:",
            VARIANTS + [f"{name}_distilled" for name in VARIANTS],
        ),
        ("--config=configs/base.py --config.train.learn", ["--config.train.learning_rate="]),
        ("--config.stages.tsr2.sample.ste", ["--config.stages.tsr2.sample.steps="]),
        ("--mode=sample --s", ["--seed=", "--same_noise", "--save_stages"]),
        ("--mode goodput --j", ["--json"]),
        ("--mode=export --prompt", []),
        ("--out=st", []),  # bash completes the name of a file
        ("--config.data.dir=", []),
        ("--config=my:folder/x.py --mode=sho", ["show", "show_data"]),
    ],
)
def test_small_what_bash_completes(script, typed, expected):
    assert completed(script, LINE + typed) == expected


def test_small_completion_where_equals_signs_do_not_break_words(script):
    assert completed(script, f"{LINE}--mode=sh", breaks="") == ["--mode=show", "--mode=show_data"]
    assert completed(script, f"{LINE}--config=configs/base.py:co", breaks=":") == ["colab", "colab_distilled"]


def test_small_completion_leaves_other_programs_alone(script):
    assert completed(script, "python -m pytest --") == []


def test_small_completion_offers_every_flag_variant_and_key(script):
    for mode in modes.MODES:
        offered = {word.rstrip("=") for word in completed(script, f"{LINE}--mode={mode} --")} - {"--config."}
        assert offered == {f"--{name}" for name in modes.read_by(mode)}
    assert set(completion._variants()["cascade.py"]) == set(common.CASCADE)
    with pytest.raises(ValueError, match="choose from paper, demo, colab, small"):
        common.variant("?", **dict.fromkeys(completion._variants()["base.py"]))


def test_small_completion_is_a_mode(command_line, capsys):
    assert main.main(["ivideo", "--mode=completion", "--compile_cache="]) == 0
    assert "complete -o default -F _ivideo python python3 " in capsys.readouterr().out
