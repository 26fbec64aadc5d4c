"""Mode prepare_data: what it measures, keeps and leaves out; black bars, shots, images."""

import json
import random

import collections_of_clips as clips
import numpy as np
import PIL.Image
import pytest
import video_files as files
from prepared_sets import contents, one_clip, prepared, quarantine, read_set

from configs import base, tsr3
from ivideo.data import pipeline, sources, video_io
from ivideo.data.images import read_image
from ivideo.data.pictures import VideoError
from ivideo.data.preparing import choosing, duplicates, measuring, prepare
from ivideo.errors import UserError
from ivideo.training import loop


def test_small_long_captions_are_left_out_by_config(tmp_path):
    (tmp_path / "in").mkdir()
    rows = [{"path": "a.mp4", "captions": ["short", "a longer one"]}]
    one_clip(tmp_path / "in")
    (tmp_path / "in" / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = prepared(tmp_path / "in", tmp_path / "out", is_too_long=lambda caption: len(caption) > 6)
    assert [list(record["captions"]) for record in read_set(out).values()] == [[b"short"]]


def test_small_one_of_several_captions_is_drawn_at_each_read(tmp_path):
    one_clip(tmp_path / "in")
    (tmp_path / "in" / "t.csv").write_text("path,text\na.mp4,one\na.mp4,two\n")
    out = prepared(tmp_path / "in", tmp_path / "out")
    source = sources.TFDSSource(out, frames=4, height=8, width=8, fps=3)
    drawn = [source.read(0, np.random.default_rng(seed))["caption"] for seed in range(20)]
    assert 4 < drawn.count("one") < 16 and set(drawn) == {"one", "two"}


def test_small_black_bars_are_found_and_cropped_when_the_set_is_read(tmp_path):
    # Gray, since the colour of lossy files is coarser than their light
    video = clips.texture(0, height=40, width=64).max(axis=-1, keepdims=True).repeat(3, axis=-1)
    framed = np.pad(video, ((0, 0), (12, 12), (0, 0), (0, 0)))
    out = prepared(one_clip(tmp_path / "in", framed), tmp_path / "out")
    (record,) = read_set(out).values()
    assert record["box"].tolist() == [12, 0, 40, 64] and (record["height"], record["width"]) == (64, 64)
    options = dict(frames=1, height=40, width=64, fps=24)
    shown = sources.TFDSSource(out, **options).read(0, np.random.default_rng(0))["video"][0]
    assert min(np.abs(shown.astype(int) - frame).mean() for frame in video) < 6
    kept = prepared(tmp_path / "in", tmp_path / "kept", crop_bars=False)
    assert not next(iter(read_set(kept).values()))["box"].any()


def test_small_dark_scenes_and_thin_edges_have_no_bars():
    from ivideo.data.preparing.bars import Bars

    def box(picture):
        bars = Bars(*picture.shape[:2])
        bars.add(picture)
        return bars.box()

    lit = np.full((100, 100, 3), 90, np.uint8)
    dark = np.zeros_like(lit)
    dark[40:60, 40:60] = 200
    assert box(dark) == box(lit) == [0] * 4
    lit[:1] = 0
    assert box(lit) == [0] * 4
    lit[:, :20] = lit[:, 80:] = 16
    assert box(lit) == [0, 20, 100, 60]


def test_small_duplicates_are_those_of_comparing_all_pairs():
    rng = random.Random(0)
    hashes = [rng.getrandbits(192) for _ in range(60)]
    for value in hashes[:40]:  # copies at distances 0 to 20
        flips = rng.sample(range(192), rng.randrange(21))
        hashes.append(value ^ sum(1 << bit for bit in flips))
    rows = [
        {"hash": f"{h:048x}", "height": 1, "width": 1 + i % 3, "frames": i % 5, "bytes": 1}
        for i, h in enumerate(hashes)
    ]
    for bits in (0, 7, 16):
        order = sorted(range(100), key=lambda i: (-rows[i]["width"], -rows[i]["frames"], i))
        kept, wanted = [], set()
        for i in order:
            near = any((hashes[i] ^ hashes[j]).bit_count() <= bits for j in kept)
            wanted.add(i) if near else kept.append(i)
        found = duplicates.duplicates(rows, bits)
        assert set(found) == wanted and set(found.values()) <= set(kept)
    assert duplicates.duplicates(rows, -1) == {}


def test_small_different_images_are_not_duplicates_by_chance():
    """Of 2,000 hashes of 64 random bits, hundreds of pairs differ in 16 bits or fewer."""
    rng = random.Random(0)
    rows = [{"hash": f"{rng.getrandbits(64):016x}", "height": 1, "width": 1, "bytes": 1} for _ in range(2000)]
    assert duplicates.duplicates(rows, 16) == {}
    near = rows[0] | {"hash": f"{int(rows[0]['hash'], 16) ^ 0b10011:016x}"}
    assert duplicates.duplicates([*rows, near], 16) == {2000: 0}


def test_recompressed_and_resized_copies_have_close_hashes():
    bits = lambda data: int(measuring.measure_video(data)["hash"], 16)  # noqa: E731
    originals = []
    for seed in range(4):
        video = clips.texture(seed, height=144, width=256)
        half = video.reshape(30, 72, 2, 128, 2, 3).mean((2, 4)).astype(np.uint8)
        originals.append(bits(files.coded(video, options={"crf": "18"})))
        for copy in (files.coded(video, options={"crf": "35"}), files.coded(half, options={"crf": "28"})):
            assert (bits(copy) ^ originals[-1]).bit_count() <= 16
    assert min((a ^ b).bit_count() for a in originals for b in originals if a != b) > 40


def test_small_a_video_is_divided_at_its_cuts(tmp_path):
    """Each shot that is long enough becomes a clip with the same frames at the same times."""
    parts = [clips.texture(0, count=30), 255 - clips.texture(1, count=12), clips.texture(2, count=41)]
    folder = one_clip(tmp_path / "in", np.concatenate(parts))
    assert quarantine_of_failure(folder, tmp_path / "whole") == {"a.mp4": "jump"}
    out = prepared(folder, tmp_path / "out", split_shots=True)
    assert quarantine(out) == {"a.mp4#00001": "short"}
    found = read_set(out)
    assert found.keys() == {"a.mp4#00000", "a.mp4#00002"}
    for name, part in (("a.mp4#00000", parts[0]), ("a.mp4#00002", parts[2])):
        video, rate = video_io.read_video(found[name]["video"])
        assert (len(video), rate) == (len(part), 24) and np.abs(video.astype(int) - part).mean() < 6
        assert found[name]["seconds"] == pytest.approx(len(part) / 24, abs=1e-3)
        assert list(found[name]["captions"]) == [b"a clip"]
    assert not (out / prepare.WORK).exists()
    assert contents(prepared(folder, tmp_path / "again", split_shots=True)) == contents(out)


def test_small_files_are_encoded_again_with_key_frames_as_often_as_asked(tmp_path):
    folder = one_clip(tmp_path / "in")
    out = prepared(folder, tmp_path / "out", gop=5)
    (record,) = read_set(out).values()
    assert record["name"] == b"a.mp4" and record["video"] != (folder / "a.mp4").read_bytes()
    container, _, packets = files.packets(record["video"])
    assert [k for k, packet in enumerate(sorted(packets, key=lambda p: p.pts)) if packet.is_keyframe][:3] == [0, 5, 10]
    container.close()
    video, rate = video_io.read_video(record["video"])
    assert rate == 24 and np.abs(video.astype(int) - clips.texture(0)).mean() < 6
    assert contents(prepared(folder, tmp_path / "again", gop=5)) == contents(out)
    with pytest.raises(UserError, match="was begun with other gop"):
        prepared(folder, out)


REPEATS = {  # numbers of the frames that are stored, of 24 per second; and how many of them are different
    "every second frame repeated, as of a cartoon": ([k // 2 for k in range(72)], 12),
    "every frame shown three times": ([k // 3 for k in range(72)], 8),
    "every fifth frame repeated, as after telecine": ([k - k // 5 for k in range(72)], 19.2),
    "all different": (range(72), 24),
    "all the same": ([0] * 72, 24),
    "standing still for a second": ([min(k, 30) + max(0, k - 54) for k in range(96)], 24),
    "one frame repeated": ([k - (k > 40) for k in range(72)], 24),
    "four times a second for a second, then all": ([min(k // 6, 4) + max(0, k - 24) for k in range(144)], 24),
}


@pytest.mark.parametrize("quality", ["18", "30"])
@pytest.mark.parametrize("kind", REPEATS)
def test_small_repeated_frames_are_not_counted(kind, quality):
    numbers, wanted = REPEATS[kind]
    video = clips.texture(0, count=max(numbers) + 1)[list(numbers)]
    measures = measuring.measure_video(files.coded(video, fps=24, options={"crf": quality}))
    assert measures["fps"] == 24 and measures["distinct_fps"] == pytest.approx(wanted, rel=0.15 if wanted < 24 else 0)


def test_small_a_stage_does_not_learn_repeated_frames(tmp_path):
    """Each stage needs as many different frames as it makes: 12 are enough for a stage of 3 per second."""
    video = clips.texture(0, count=36).repeat(2, axis=0)
    folder = one_clip(tmp_path / "in", video)
    with pytest.raises(UserError, match="none of 1 videos is left: 1 rate"):
        prepared(folder, tmp_path / "out", min_fps=24)
    assert "different frames per second, stored as 24.00" in (tmp_path / "out" / prepare.QUARANTINE).read_text()
    (record,) = read_set(prepared(folder, tmp_path / "kept")).values()
    assert record["distinct_fps"] == pytest.approx(12, rel=0.06)


def quarantine_of_failure(folder, out):
    with pytest.raises(UserError, match="none of 1 videos is left"):
        prepared(folder, out)
    return quarantine(out)


def jpeg(seed):
    return measuring.thumbnail(clips.texture(seed, count=1)[0], height=48)


def test_small_images_are_prepared_and_packed_behind_videos(tmp_path):
    """Damaged ones are left out, those turned by their EXIF data are upright, and none is a frame of a video."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.jpg").write_bytes(jpeg(50 + number))
    image = PIL.Image.fromarray(np.rot90(clips.texture(56, count=1)[0]))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter to the right
    image.save(folder / "6.png", exif=exif)
    (folder / "7.jpg").write_bytes(jpeg(57)[:600])
    (folder / "8.jpg").write_bytes(jpeg(50))
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text(f"image {path.stem}")
    images = prepared(folder, tmp_path / "image_set", media="image")
    assert read_set(images).keys() == {*(f"{k}.jpg" for k in range(1, 6)), "0.jpg", "6.png"}
    assert quarantine(images) == {"7.jpg": "unreadable", "8.jpg": "duplicate"}
    record = read_set(images)["6.png"]
    assert (record["height"], record["width"]) == (48, 64)
    assert clips.is_upright(read_image(record["image"])[None])

    source = sources.ImageSource(images, height=24, width=32, crop=sources.Crop(4, 16, 16))
    found = source.image(0, np.random.default_rng(0))
    assert found["image"].shape == (16, 16, 3) and found["caption"] == "image 0"
    clip_set = prepared(one_clip(tmp_path / "in"), tmp_path / "clip_set")
    config = base.get_config("small")
    config.update_from_flattened_dict(
        {"data.source": "tfds", "data.dir": str(clip_set), "data.image_dir": str(images), "data.num_images": 4}
    )
    source = loop.data_source(config)
    dataset = pipeline.make_dataset(
        source, images=loop.image_source(config), seed=0, num_images=4, tokenize=lambda texts, length: tokens(texts),
        text_length=1,
    )  # fmt: skip
    drawn = [dataset[k] for k in range(6)]
    numbers = np.array([element["image_tokens"][:, 0] for element in drawn])
    assert set(numbers.ravel()) == set(range(7)) and all(len(set(row)) == 4 for row in numbers)
    assert all(element["tokens"] == -1 and element["images"].shape == (4, 8, 8, 3) for element in drawn)


def tokens(texts):
    """The number of an image, from its caption; -1 for a clip."""
    numbers = [int(text.split()[1]) if text.startswith("image") else -1 for text in texts]
    return np.array(numbers)[:, None], np.ones((len(texts), 1), bool)


def test_small_an_unreadable_image_is_replaced_and_named(tmp_path, caplog):
    class Clips:
        def __len__(self):
            return 1

        def read(self, index, rng):
            return {"video": np.zeros((1, 2, 2, 3), np.uint8), "caption": "x"}

    class Images:
        def __len__(self):
            return 3

        def image(self, index, rng):
            self.check(index)
            return {"image": np.full((2, 2, 3), index, np.uint8), "caption": "x"}

        def check(self, index):
            if index == 1:
                raise video_io.VideoError("image 1 is damaged.")

    options = dict(tokenize=lambda texts, length: tokens(texts), text_length=1, images=Images(), num_images=2)
    batches = pipeline.make_iterator(Clips(), batch_size=4, seed=0, max_unreadable=1, num_threads=0, **options)
    assert set(np.unique(next(batches)["images"])) == {0, 2}
    (said,) = [record.getMessage() for record in caplog.records if record.name == "ivideo"]
    assert said.startswith("image 1 is damaged. Another clip is used in its place (1 unreadable")


@pytest.mark.parametrize(("distinct", "reason"), [(24, None), (18.5, None), (17.5, "rate"), (12, "rate")])
def test_small_a_few_repeated_frames_are_no_reason(distinct, reason):
    """Coarse coding of a dark or calm scene repeats up to a quarter of the frames of a true 24 fps clip."""
    limits = choosing.Limits.of(tsr3.get_config("demo"))
    row = {"seconds": 60, "fps": 24, "distinct_fps": distinct, "motion": 5, "jump": 1}
    found = choosing._video_problem(row, limits)
    assert (found and found[0]) == reason
    if found:
        assert found[1].endswith("stored as 24.00: frames are repeated (config.prepare.min_fps)")


def test_small_an_empty_image_and_one_that_is_none_are_said_alike_every_time():
    for data, said in ((b"", "is empty, expected an image"), (b"text" * 99, "is no image that Pillow can read")):
        messages = []
        for _ in range(2):
            with pytest.raises(VideoError) as raised:
                read_image(data)
            messages.append(str(raised.value))
        assert messages[0] == messages[1] and said in messages[0]
