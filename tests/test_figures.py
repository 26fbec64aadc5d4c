"""The command that measures tables and figures, with a tiny cascade of random weights."""

import json

import figures
import light_network
import pytest
from distillations import random_params
from PIL import Image

from configs import cascade as cascade_config
from ivideo import stages
from ivideo.data import shapes
from ivideo.evaluation import generated
from ivideo.sampling import cascade
from ivideo.weights import config_metadata, save_params

PHASES = ("", "2_stochastic", "4")


def light(config):
    for name in config.order:
        config.stages[name].update_from_flattened_dict(
            {**light_network.OPTIONS, "sample.batch": 2, "train.augmentation_min": 0.5}
        )
    return config


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of random weights of base and tsr1, and of two students of each."""
    folder, config = tmp_path_factory.mktemp("weights"), light(cascade_config.get_config("small"))
    for number, phase in enumerate(PHASES):
        for stage in cascade.select(stages.distilled(config, phase) if phase else config, None, "tsr1"):
            path = folder / f"{stage.stage}{f'_{phase}' if phase else ''}.safetensors"
            save_params(str(path), random_params(stage, number), metadata=config_metadata(stage))
    return folder


@pytest.fixture
def figure(weights, tmp_path, monkeypatch, capsys):
    """A function that runs the command with base and tsr1 of a light cascade. Returns what it prints."""
    load = figures.load_config
    monkeypatch.setattr(figures, "load_config", lambda spec: light(load(spec)))

    def run(*arguments):
        options = {"original": "small", "distilled": "small_distilled", "to_stage": "tsr1", "clips": 2}
        options |= {"originals": weights, "students": weights}
        figures.main([str(tmp_path / "out"), *(f"--{name}={value}" for name, value in options.items()), *arguments])
        return capsys.readouterr().out

    return run


@pytest.fixture
def measured(monkeypatch):
    """Clips are drawn instead of sampled; the seeds of each call are recorded."""
    calls = []

    def measure(configs, attributes, *, seeds, **_):
        calls.append(seeds)
        drawn = (
            (config.stage, number, shapes.render(attrs, number, frames=4, height=24, width=40))
            for config in configs for number, attrs in enumerate(attributes)
        )  # fmt: skip
        return generated.measure_all(drawn, attributes), {config.stage: 0.5 for config in configs}

    monkeypatch.setattr(figures.evaluate, "measure_captions", measure)
    return calls


def test_small_table_of_mixed_cascades(figure, tmp_path, measured):
    """Rows are kept, seeds are added, and another number of clips is refused."""
    command = ["table1", "--weight=2", "--high=3", "--low=1", "--only=original-distilled"]
    out = figure(*command, "--seeds=0")
    lines = [line for line in out.splitlines() if line.startswith("| original / distilled")]
    assert [line.split(" | ")[:4] for line in lines] == [
        ["| original / distilled", kind, "tsr1", "2 (1 seed)"] for kind in ("constant", "oscillating")
    ]
    rows = json.loads((tmp_path / "out" / "table1.json").read_text())
    # The base has four steps with two evaluations each, the student of tsr1 two with one
    assert [row["evaluations"] for row in rows] == [4 * 2 + 2] * 2
    assert [row["seconds"] for row in rows] == [1, 1]
    small, students = cascade_config.get_config("small"), stages.distilled(cascade_config.get_config("small"))
    base, tsr1 = (figures.forward_flops(c) for c in (light(small).stages.base, light(students).stages.tsr1))
    assert [row["flops"] for row in rows] == [8 * base + 2 * tsr1] * 2
    assert (tmp_path / "out" / "table1.md").read_text().strip() in out
    first = json.loads((tmp_path / "out" / "table1" / "original-distilled constant.0.json").read_text())
    sample = first["settings"]["stages"]
    assert (sample["base"]["phase"], sample["tsr1"]["phase"]) == ("", "2_stochastic")
    assert (sample["base"]["sample"]["weight"], sample["tsr1"]["sample"]["weight"]) == (2, 2)

    measured.clear()
    out = figure(*command, "--seeds=0,5")
    assert measured == [[(5, 0), (5, 1)]] * 2
    assert out.count("| 4 (2 seeds) |") == 2
    assert figure(*command, "--seeds=0,5").splitlines()[2:] == out.splitlines()[2:] and len(measured) == 2
    with pytest.raises(SystemExit) as error:
        figure(*command, "--seeds=0", "--clips=4")
    assert error.value.code == 2


def test_rows_of_weights_and_ratios(figure, tmp_path, measured):
    figure("guidance", "augmentation", "--networks=distilled", "--values=2.5,4", "--seeds=0")
    rows = {part: json.loads((tmp_path / "out" / f"{part}.json").read_text()) for part in ("guidance", "augmentation")}
    assert [row["labels"] for row in rows["guidance"]] == [{"network": "distilled", "weight": w} for w in (2.5, 4)]
    assert [row["labels"] for row in rows["augmentation"]] == [{"network": "distilled", "SNR": w} for w in (2.5, 4)]
    files = [json.loads(path.read_text()) for path in sorted((tmp_path / "out" / "augmentation").iterdir())]
    assert [file["settings"]["stages"]["tsr1"]["sample"]["augmentation_snr"] for file in files] == [2.5, 4]
    pytest.importorskip("matplotlib")
    for part in rows:
        assert (tmp_path / "out" / f"{part}.png").read_bytes()[:4] == b"\x89PNG"


def test_small_rows_of_steps(figure, tmp_path, measured):
    """Students without weights are left out, with the reason."""
    out = figure("steps", "--seeds=0", "--values=8,4,2")
    assert "steps: distilled 8 is left out: " in out
    rows = json.loads((tmp_path / "out" / "steps.json").read_text())
    assert [(row["labels"]["network"], row["labels"]["steps"], row["evaluations"]) for row in rows] == [
        ("distilled", 4, 8), ("distilled", 2, 4), ("original", 8, 8), ("original", 4, 8), ("original", 2, 4)
    ]  # fmt: skip


def test_a_row_that_is_sampled(figure, tmp_path):
    """Of the distilled cascade: both stages in two steps with one evaluation each, measured and timed."""
    figure("guidance", "--networks=distilled", "--values=1", "--seeds=0")
    (row,) = json.loads((tmp_path / "out" / "guidance.json").read_text())
    assert (row["clips"], row["evaluations"], row["to_stage"]) == (2, 4, "tsr1")
    assert row["seconds"] > 0 and [*row["table"]["stages"]] == ["base", "tsr1"]


def test_contact_sheet(figure, tmp_path):
    out = figure("contact", "--seeds=0", "--frame_width=20")
    assert out.splitlines()[0].startswith("a red star moving right on a teal background: ")
    with Image.open(tmp_path / "out" / "contact.png") as picture:
        assert picture.size == (6 * 24 + 4, 12 * (14 + 20 + 4) + 4)
    assert "contact.png exists" in figure("contact")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["guidance", "--values=9"], "sample.weight = 9.0: expected a guidance weight that students are trained with"),
        (["guidance", "--stages=ssr9"], "stage 'ssr9' is unknown: choose from base, tsr1, "),
        (["steps", "--networks=teacher"], "--networks: expected original, distilled or both, not teacher"),
        (["table1", "--clips=1"], "--clips: expected 2 or more"),
        (["contact", "--distilled=other"], "variant 'other' is unknown"),
        (["contact", "--students=/nowhere"], "/nowhere/base has no checkpoints"),
    ],
)
def test_small_mistakes_are_refused_at_once(figure, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        figure(*arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("prompt", figures.PROMPTS)
def test_small_prompts_are_captions(prompt):
    assert shapes.caption(shapes.parse_caption(prompt)) == prompt
