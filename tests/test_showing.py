"""Mode show_data writes what the network sees in training."""

import numpy as np
import PIL.Image
import pytest

from configs import base, ssr1
from ivideo import main
from ivideo.data import video_io
from ivideo.errors import UserError
from ivideo.text import load_encoder, tokenizers
from ivideo.training import loop, showing, step


@pytest.mark.parametrize("stage", [base, ssr1], ids=["base", "ssr1"])
def test_it_is_what_the_step_is_given(stage):
    """Clips, images and the noisy low-resolution clip of the first step, to the rounding to uint8."""
    config = stage.get_config("small")
    encoder = load_encoder(config.text)
    batch = next(loop.make_data(config, encoder))
    prepared = step.prepare(encoder.module, encoder.params, batch)
    keys = step.draws(step.step_key(config, 0), config.train.batch_size)["key"]
    given = step.example(config, prepared, keys).given
    for k, sample in enumerate(showing.read(config, 3)):
        for name in ("video", "images"):
            np.testing.assert_array_equal(sample[name], batch[name][k])
        assert len(sample["image_captions"]) == config.data.num_images
        if config.cond.frames:
            wanted = np.clip(given["cond"][k][..., :3], -1, 1)
            np.testing.assert_allclose(video_io.to_float(sample["low_res"]), wanted, atol=0.5 / 127.5 + 1e-5)
            np.testing.assert_allclose(sample["level"], given["aug_logsnr"][k], rtol=1e-6)
        else:
            assert "low_res" not in sample


def test_the_command_writes_videos_captions_and_a_sheet(tmp_path, capsys, command_line):
    out = tmp_path / "seen"
    command = ["ivideo", "--config=configs/ssr1.py:small", "--mode=show_data", f"--out={out}", "--config.text.length=9"]
    assert main.main(command) == 0
    assert f"{out}: 4 clips of stage ssr1, sheet.png, captions.txt, 000.mp4, …" in capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    assert names == {"sheet.png", "captions.txt", *(f"{k:03}{end}.mp4" for k in range(4) for end in ("", ".low_res"))}
    config = ssr1.get_config("small")
    lines = (out / "captions.txt").read_text().splitlines()
    assert len(lines) == 4 * (1 + config.data.num_images) and {len(line) for line in lines} == {8}  # and an end token
    clip, rate = video_io.read_video(out / "000.mp4")
    frames = config.train.crop_frames or config.video.frames
    assert rate == config.video.fps and len(clip) == frames and clip.shape[1] >= showing.SMALLEST
    with PIL.Image.open(out / "sheet.png") as sheet:
        assert sheet.height == 16 * (showing.HEIGHT + showing.LINE + showing.MARGIN)
    before = (out / "sheet.png").read_bytes()
    config.text.length = 9
    with pytest.raises(UserError, match="sheet.png exists: choose another --out, or pass --overwrite"):
        showing.show_data(config, str(out))
    showing.show_data(config, str(out), overwrite=True)
    assert (out / "sheet.png").read_bytes() == before


def test_small_nothing_is_written_where_the_data_cannot_be_read(tmp_path):
    config = base.get_config("small")
    config.update_from_flattened_dict({"data.source": "tfds", "data.dir": str(tmp_path / "none")})
    with pytest.raises(UserError, match="expected a folder with dataset_info.json"):
        showing.show_data(config, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["a red star", "été, видео", ""])
def test_small_tokens_are_decoded(text):
    tokens, _ = tokenizers.byte_tokens([text], 40)
    assert tokenizers.Bytes().decode(tokens[0]) == text
