"""launch/compare_sizes.py: sizes of the base are trained and measured alike, and a second run changes nothing."""

import json

import compare_sizes
import launch_scripts
import light_network
import pytest

from configs import base


def test_small_sizes_differ_in_their_width_alone():
    class Args:
        steps, clips, i3d = 8, 16, "i3d.ckpt"

    narrow, wide = (compare_sizes.size_config(width, Args) for width in (32, 64))
    assert (narrow.model.channels, wide.model.channels) == ((32, 32), (64, 64))
    assert narrow.train.evaluate_every == narrow.train.checkpoint_every == 2
    narrow.model.channels = (64, 64)
    assert narrow.to_dict() == wide.to_dict()


def test_sizes_are_trained_measured_and_drawn(tmp_path, monkeypatch, capsys):
    def size_config(width, args):
        config = base.get_config("small")
        config.update_from_flattened_dict({**light_network.OPTIONS, "model.channels": (width,), "sample.batch": 4})
        config.train.steps, config.train.decay = args.steps, "constant"
        config.train.evaluate_every = config.train.checkpoint_every = args.steps // 4
        config.evaluate.clips, config.evaluate.frames = args.clips, 4
        return config

    monkeypatch.setattr(compare_sizes, "size_config", size_config)
    arguments = [str(tmp_path / "sizes"), "--widths=8", "--steps=4", "--clips=4"]
    compare_sizes.main(arguments)
    rows = json.loads((tmp_path / "sizes" / "sizes.json").read_text())
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {row["measure"] for row in rows} == {"follows its caption"}
    assert (tmp_path / "sizes" / "sizes.png").stat().st_size > 1000
    said = capsys.readouterr().out
    compare_sizes.main(arguments)
    assert capsys.readouterr().out == said
    assert json.loads((tmp_path / "sizes" / "sizes.json").read_text()) == rows


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{tmp}/new", "--steps=-5"], "--steps=-5: expected a multiple of 4"),
        (["{tmp}/new", "--widths=32,x"], "'x'"),
        (["{tmp}/new", "--clips=1"], "config.evaluate.clips = 1"),
        (["{tmp}/file"], "File exists"),
        (["{tmp}/new", "--i3d={tmp}/none.ckpt"], "no weights at"),
        (["{tmp}/other"], "other has results of {'steps': 8, 'clips': 64, 'i3d': True}, expected"),
    ],
)
def test_small_mistakes_are_said_before_anything_is_trained(tmp_path, capsys, arguments, said):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "about.json").write_text('{"steps": 8, "clips": 64, "i3d": true}')
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    assert said in launch_scripts.refusal(compare_sizes, arguments, capsys)
    assert not (tmp_path / "new").exists()
