"""Parts of files are read frame by frame as from the whole file: at any rate and start, in every kind of file."""

import functools
import io
from fractions import Fraction

import av
import numpy as np
import pytest
import video_files as files

from ivideo.data import decoding, sources, video_io
from ivideo.data.resizing import resize_video

COUNT, RATE = 100, 25
RATES = (1, 2, 3, 5, 6, 8, 12, 24, 25, Fraction(30000, 1001))
X264 = {"g": "12", "sc_threshold": "0", "bf": "3", "x264-params": "b-adapt=0"}
OPEN = X264 | {"x264-params": "b-adapt=0:open-gop=1"}
X265 = "log-level=none:open-gop=1:bframes=3:b-adapt=0:scenecut=0:keyint=12:min-keyint=12"
UNEVEN = sorted(np.random.default_rng(0).choice(np.arange(1, 4000), COUNT - 1, replace=False).tolist())


def indexed(count=COUNT):
    """Frames with their number in binary, as eight black or white columns."""
    bits = np.arange(count)[:, None] >> np.arange(8) & 1
    rows = np.repeat(255 * bits, 8, axis=1).astype(np.uint8)
    return np.broadcast_to(rows[:, None, :, None], (count, 16, 64, 3))


def number(image):
    """What `indexed` numbered a frame, possibly after resizing."""
    columns = image.mean(axis=(0, 2)).reshape(8, -1).mean(axis=1)
    return int((columns > 128) @ (1 << np.arange(8)))


def with_edit_list():
    data = files.coded(indexed(), options=X264)
    with av.open(io.BytesIO(data)) as container:
        return files.with_edit_list(data, start=int(5 / (RATE * container.streams.video[0].time_base)))


def of_uneven_times():
    """Matroska, in milliseconds; the first frame is at 0."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=RATE, options=X264)
        stream.height, stream.width, stream.pix_fmt = 16, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for pts, image in zip([0, *UNEVEN], indexed(), strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


EVEN = [Fraction(k, RATE) for k in range(COUNT)]
# How a file is made, and the times of its frames after the first one, which may not be frame 0
KINDS = {
    "b_frames": (lambda: files.coded(indexed(), options=X264), EVEN),
    "one_group": (lambda: files.coded(indexed(), options={"g": "999", "sc_threshold": "0"}), EVEN),
    "open_group_h264": (lambda: files.coded(indexed(), options=OPEN), EVEN),
    "open_group_hevc": (lambda: files.coded(indexed(), codec="libx265", options={"x265-params": X265}), EVEN),
    "edit_list": (with_edit_list, EVEN[:-5]),
    "uneven": (of_uneven_times, [Fraction(t, 1000) for t in (0, *UNEVEN)]),
    "mpegts": (lambda: files.coded(indexed(), form="mpegts", options=X264), EVEN),
    "open_group_mpegts": (lambda: files.coded(indexed(), form="mpegts", options=OPEN), EVEN),
    "matroska": (lambda: files.coded(indexed(), form="matroska", options=OPEN), EVEN),
    "avi": (lambda: files.coded(indexed(), form="avi", options=X264), EVEN),
    "raw": (lambda: files.coded(indexed(), form="h264", options=X264), EVEN),
    "vp9": (lambda: files.coded(indexed(), form="webm", codec="libvpx-vp9", options={"g": "12"}), EVEN),
}


@functools.cache
def made(kind):
    return KINDS[kind][0]()


@pytest.mark.parametrize("kind", KINDS)
def test_small_parts_have_exactly_the_frames_that_the_rate_implies(kind):
    """Whatever the start, also the last possible one; and the pixels that decoding everything gives."""
    data, times = made(kind), KINDS[kind][1]
    whole, _ = video_io.read_video(data)
    first = number(whole[0])
    assert [number(image) for image in whole] == list(range(first, first + len(times)))
    with decoding.open_video(data, "a clip") as video:
        seconds, slack = video.frame_seconds, decoding._slack(video)
    for fps in RATES:
        frames = max(1, int(fps * 3 // 2))
        for share in (0.43, 1):
            drawn = []

            def choose(count, share=share, drawn=drawn):
                drawn.append((count, int(share * (count - 1))))
                return drawn[0][1]

            found = list(video_io.iter_frames(data, frames=frames, fps=fps, choose=choose))
            ((count, start),) = drawn
            targets = [start * seconds + k / Fraction(fps) for k in range(frames)]
            wanted = [max(k for k, time in enumerate(times) if time <= target + slack) for target in targets]
            assert [number(image) - first for image in found] == wanted
            np.testing.assert_array_equal(found, whole[wanted])
        # The last start is the last one for which there are frames. AVI has decoding times, which are earlier
        late = (3 if kind == "avi" else 1) * seconds - seconds / 2
        assert (count - 1) * seconds + (frames - 1) / Fraction(fps) <= times[-1] + slack
        assert count * seconds + (frames - 1) / Fraction(fps) > times[-1] - late


def test_small_only_frames_that_are_needed_are_decoded(monkeypatch):
    """From the key frame before, to the one after the last; of the others, those that they depend on."""
    given = []
    picture = decoding.picture
    decoded = decoding.decoded

    def count(*args, **options):
        for frame in decoded(*args, **options):
            given.append(frame)
            yield frame

    converted = []
    monkeypatch.setattr(decoding, "decoded", count)
    monkeypatch.setattr(decoding, "picture", lambda *args: converted.append(1) or picture(*args))
    data = made("b_frames")  # a key frame every 12 frames, three B-frames in four
    (image,) = video_io.iter_frames(data, frames=1, fps=25, choose=lambda count: 58)
    assert number(image) == 58 and len(converted) == 1
    assert len(given) <= 1 + 9  # the file's first frame, and of frames 48 to 59 those that others depend on
    given.clear()
    found = list(video_io.iter_frames(data, frames=10, fps=Fraction(25, 8), choose=lambda count: 12))
    assert [number(image) for image in found] == list(range(12, 90, 8))
    assert len(given) < 60  # of 74
    assert len(converted) == 1 + 10


def test_small_a_crop_is_that_of_the_whole_resized_clip():
    """In time and space, enlarged or reduced, from a source of another aspect ratio."""
    video = np.random.default_rng(0).integers(256, size=(40, 48, 96, 3), dtype=np.uint8)
    data = files.coded(video, options=X264)
    for height, width in ((24, 40), (96, 160), (48, 80)):
        crop = sources.Crop(6, height // 4, width // 2, space=2)
        source = files.source_of(data, crop=crop, height=height, width=width, fps=12)
        for seed in range(3):
            found = source.read(0, np.random.default_rng(seed))["video"]
            rng = np.random.default_rng(seed)
            _, rows, columns = crop.place(rng, frames=6, height=height, width=width)
            whole = resize_video(
                video_io.iter_frames(data, frames=6, fps=12, choose=rng.integers), height=height, width=width
            )
            assert whole.shape == (6, height, width, 3)
            np.testing.assert_array_equal(found, whole[:, rows, columns])


def test_every_start_of_a_long_clip_is_drawn():
    source = files.source_of(made("b_frames"), crop=sources.Crop(5, 16, 64), height=16, width=64, fps=5)
    starts = [number(source.read(0, np.random.default_rng(seed))["video"][0]) for seed in range(300)]
    assert min(starts) == 0 and max(starts) == COUNT - 1 - 4 * 5 and len(set(starts)) > 70
    images = [number(source.image(0, np.random.default_rng(seed))["image"]) for seed in range(300)]
    assert min(images) < 3 and max(images) > COUNT - 4 and len(set(images)) > 85


def test_small_damage_after_the_part_that_is_read_does_no_harm():
    """But a check of the whole clip finds it."""
    video = np.concatenate([files.scene(8, 96, 160)] * 6) + np.random.default_rng(0).integers(0, 25, (48, 96, 160, 3))
    data = files.coded(np.clip(video, 0, 255).astype(np.uint8), options={"g": "8"})
    bad = files.damaged(data, at=0.5)
    assert len(list(video_io.iter_frames(bad, frames=16, fps=25, choose=lambda count: 0))) == 16
    with pytest.raises(video_io.VideoError, match="is damaged at|cannot be read"):
        list(video_io.iter_frames(bad, frames=30, fps=25, choose=lambda count: count - 1))
    video_io.check_frames(data, frames=48, fps=25)
    with pytest.raises(video_io.VideoError, match="is damaged at|cannot be read"):
        video_io.check_frames(bad, frames=16, fps=25)
    with pytest.raises(video_io.VideoError, match="ends after 48 of these frames"):
        video_io.check_frames(data, frames=49, fps=25)
