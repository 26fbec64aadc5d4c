"""Video files as users have them: rotated, anamorphic, HDR, cut without re-encoding, damaged."""

import io
import logging
import types
from fractions import Fraction

import av
import numpy as np
import pytest
import video_files as files
from video_files import near, read

from ivideo.data import colour, decoding, pictures, resizing, sources, video_io
from ivideo.data.video_io import VideoError


# What is at the top left and at the bottom right, and the size, of the scene that is red above and blue below.
@pytest.mark.parametrize(
    ("matrix", "shape", "first", "last"),
    [
        (files.IDENTITY, (384, 640), (251, 0, 0), (0, 0, 251)),
        (files.LEFT, (640, 384), (251, 0, 0), (0, 0, 251)),
        (files.RIGHT, (640, 384), (0, 0, 251), (251, 0, 0)),
        (files.UPSIDE_DOWN, (384, 640), (0, 0, 251), (251, 0, 0)),
        (files.MIRRORED, (384, 640), (251, 0, 0), (0, 0, 251)),
    ],
)
def test_small_frames_are_turned_and_mirrored_as_players_show_them(matrix, shape, first, last):
    plain = files.coded(files.scene(4), matrix=1, colorspace=1)
    video = read(files.with_matrix(plain, matrix))
    assert video.shape == (4, *shape, 3)
    near(video[1, 8, 8], first)
    near(video[1, -8, -8], last)
    # The white box of the first frame: at the left of the scene's upper half.
    turned = {
        files.IDENTITY: lambda v: v,
        files.LEFT: lambda v: np.rot90(v, 1, (1, 2)),
        files.RIGHT: lambda v: np.rot90(v, -1, (1, 2)),
        files.UPSIDE_DOWN: lambda v: v[:, ::-1, ::-1],
        files.MIRRORED: lambda v: v[:, :, ::-1],
    }[matrix]
    np.testing.assert_array_equal(video, turned(read(plain)))


def test_small_pixels_are_shown_square():
    wide = files.scene(4, 384, 640)
    for squeezed, sar in ((wide[:, :, ::2], (2, 1)), (wide[:, ::2], (1, 2))):
        video = read(files.coded(squeezed, sar=sar, matrix=1, colorspace=1))
        assert video.shape == (4, 384, 640, 3)
        assert np.abs(video.astype(int) - wide).mean() < 3
    # Turned as well: the ratio is of the stored frame.
    turned = files.with_matrix(files.coded(wide[:, :, ::2], sar=(2, 1)), files.LEFT)
    assert read(turned).shape == (4, 640, 384, 3)
    stream = types.SimpleNamespace(sample_aspect_ratio=Fraction(500, 1))
    with pytest.raises(VideoError, match="x.mp4 has pixels of 500:1, expected about 1:1"):
        pictures.picture(av.VideoFrame(640, 64, "rgb24"), stream, pictures.Extras(None, False), "x.mp4")


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("matrix", [1, 6, 9])
def test_small_matrix_and_range_are_those_the_file_states(matrix, full_range):
    video = files.scene(4, 96, 160)
    states = dict(colorspace=matrix, color_range=2 if full_range else 1)
    data = files.coded(video, matrix=5 if matrix == 6 else matrix, full_range=full_range, **states)
    near(read(data)[0, 90, 80], (0, 0, 251))
    near(read(data)[0, 4, 80], (251, 0, 0))


def test_small_a_file_without_tags_is_bt601_when_small_and_bt709_when_large():
    for (height, width), matrix in (((96, 160), 5), ((576, 160), 5), ((578, 160), 1), ((96, 1280), 1)):
        data = files.coded(files.scene(2, height, width), matrix=matrix)
        near(read(data, frames=2)[0, 4, width // 2], (251, 0, 0))
    # Motion JPEG is always BT.601 of full range.
    jpeg = files.coded(
        files.scene(2, 720, 64), form="avi", codec="mjpeg", pix_fmt="yuvj420p", matrix=5, full_range=True, color_range=2
    )
    near(read(jpeg, frames=2)[0, 4, 32], (251, 0, 0))


@pytest.mark.parametrize("extension", ["mp4", "mov", "webm"])
def test_small_what_is_written_says_that_it_is_bt709(tmp_path, extension):
    path = tmp_path / f"clip.{extension}"
    video_io.write_video(path, files.scene(4, 96, 160), fps=25)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        context = container.streams.video[0].codec_context
        assert (frame.colorspace, frame.color_range) == (1, 1)
        assert extension == "webm" or (context.color_trc, context.color_primaries) == (1, 1)
    near(video_io.read_video(path)[0][0, 4, 80], (251, 0, 0))


def hdr_signal(rgb, nits, transfer):
    """The PQ or HLG signal, uint16 [3], of an SDR colour whose white is at `nits` on the display (BT.2100)."""
    light = np.linalg.inv(colour._to_bt709_primaries(colour.BT2020)) @ ((np.array(rgb) / 255) ** 2.4) * nits
    if transfer == colour.PQ:
        signal = colour._light_to_pq(light)
    else:
        scene = light / 1000
        scene = scene * max(scene @ [0.2627, 0.6780, 0.0593], 1e-9) ** (1 / 1.2 - 1)
        log = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
        signal = np.where(scene <= 1 / 12, np.sqrt(3 * scene), log)
    return np.rint(65535 * np.clip(signal, 0, 1)).astype(np.uint16)


@pytest.mark.parametrize("transfer", [colour.PQ, colour.HLG])
def test_small_hdr_becomes_bt709(transfer):
    # Reference white stays below the highlights, which keep a tenth of the range; hues stay; black is black.
    wanted = {
        ((255, 255, 255), 203): (230, 230, 230),
        ((255, 255, 255), 1000): (255, 255, 255),
        ((251, 0, 0), 203): (229, 0, 0),
        ((251, 0, 0), 100): (187, 0, 0),
        ((0, 0, 251), 203): (0, 0, 229),
        ((128, 128, 128), 203): (128, 128, 128),
        ((0, 0, 0), 203): (0, 0, 0),
    }
    for (rgb, nits), shown in wanted.items():
        signal = hdr_signal(rgb, nits, transfer)
        image = np.broadcast_to(signal, (300, 2, 3))  # more rows than are converted at once
        found = colour.to_bt709(image, transfer=transfer, primaries=colour.BT2020)
        assert found.shape == (300, 2, 3) and (found == found[0, 0]).all()
        near(found[0, 0], shown, off=2)
        video = np.broadcast_to(signal, (2, 64, 64, 3))
        data = files.coded(
            video,
            codec="libx264",  # FFmpeg 8 sometimes fails to write ten bits of x265
            pix_fmt="yuv420p10le",
            rgb="rgb48le",
            matrix=9,
            colorspace=9,
            color_trc=transfer,
            color_primaries=9,
            options={"crf": "4"},
        )
        near(read(data, frames=2)[0, 32, 32], shown, off=12)  # ten bits near black


def test_small_wide_gamuts_of_sdr_become_bt709():
    red = np.linalg.inv(colour._to_bt709_primaries(colour.BT2020)) @ [1, 0, 0]
    signal = np.rint(255 * red ** (1 / 2.4)).astype(np.uint8)
    data = files.coded(np.broadcast_to(signal, (2, 64, 64, 3)), matrix=9, colorspace=9, color_trc=14, color_primaries=9)
    near(read(data, frames=2)[0, 32, 32], (255, 0, 0), off=6)
    # ITU-R BT.2087 has the inverse to four digits.
    np.testing.assert_allclose(
        np.linalg.inv(colour._to_bt709_primaries(colour.BT2020))[0], [0.6274, 0.3293, 0.0433], atol=1e-4
    )


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        (dict(colorspace=14, color_trc=16, color_primaries=9), "has colour matrix 14 of ITU-T H.273"),
        (dict(colorspace=8), "has colour matrix 8 of ITU-T H.273"),
        (dict(colorspace=1, color_trc=8), "has transfer 8"),
    ],
)
def test_small_colours_that_cannot_be_converted_are_refused_with_a_command(tags, message):
    data = files.coded(files.scene(2, 64, 64), **tags)
    with pytest.raises(VideoError, match=f"{message}.*ffmpeg -i IN -vf libplacebo"):
        read(data, frames=2)


# Cut without coding, and other files whose header counts frames that are not shown


def long_clip(**how):
    """24 numbered frames in groups of eight."""
    how = dict(codec="libx264", options={"g": "8", "sc_threshold": "0"}) | how
    return files.coded(files.counting(24), **how)


def test_small_a_lossless_trim_with_an_edit_list_is_read(caplog):
    # Shown from frame 3 on; the group's frames before it are decoded only.
    data = long_clip()
    with av.open(io.BytesIO(data)) as container:
        ticks = int(3 / (25 * container.streams.video[0].time_base))
    trimmed = files.with_edit_list(data, start=ticks)
    assert files.numbers(read(trimmed, frames=12)) == list(range(3, 15))
    assert files.numbers(read(trimmed, frames=4, start=Fraction(12, 25))) == [15, 16, 17, 18]
    with caplog.at_level(logging.WARNING, "ivideo"):
        video, rate = video_io.read_video(trimmed)
    assert (files.numbers(video), rate) == (list(range(3, 24)), 25)
    assert "21 frames can be read, but the file states 24" in caplog.text


def test_small_a_mov_with_a_negative_start_is_read():
    data = long_clip(form="mov")
    moved = files.remuxed(data, "mov", options={"avoid_negative_ts": "disabled"}, shift=-5)
    assert files.numbers(read(moved, frames=8)) == list(range(5, 13))
    assert files.numbers(read(moved, frames=8, start=Fraction(1, 5))) == list(range(10, 18))
    assert files.numbers(video_io.read_video(moved)[0]) == list(range(5, 24))


@pytest.mark.parametrize("form", ["mp4", "mpegts", "matroska"])
def test_small_an_hevc_cut_at_an_open_group_is_read(form):
    options = {"g": "8", "x265-params": "log-level=none:open-gop=1:bframes=3:b-adapt=0:scenecut=0"}
    whole = long_clip(codec="libx265", options=options)
    container, stream, found = files.packets(whole)
    keys = [k for k, packet in enumerate(found) if packet.is_keyframe]
    leading = [p.pts for p in found[keys[1] + 1 :] if p.pts < found[keys[1]].pts]
    first = round(found[keys[1]].pts * float(stream.time_base) * 25)
    container.close()
    assert leading, "the encoder made no open group"
    cut = files.remuxed(whole, form, keep=lambda k, packet: k >= keys[1])
    assert files.numbers(read(cut, frames=10)) == list(range(first, first + 10))
    assert len(video_io.read_video(cut)[0]) == 24 - first


def test_small_an_h264_stream_cut_within_a_group_begins_at_its_first_key_frame(caplog):
    cut = files.remuxed(long_clip(form="mpegts"), "mpegts", keep=lambda k, packet: k >= 3)
    with caplog.at_level(logging.WARNING, "ivideo"):
        assert files.numbers(read(cut, frames=8)) == list(range(8, 16))
    assert "its first 0.16 seconds do not decode and are skipped" in caplog.text


def test_small_an_avi_is_read_by_its_decoding_times():
    # H.264 with B-frames in AVI has no presentation times; dropped frames are counted in the header.
    data = long_clip(form="avi")
    assert files.numbers(read(data, frames=24)) == list(range(24))
    assert files.numbers(read(data, frames=4, start=Fraction(2, 25))) == [2, 3, 4, 5]
    uneven = files.coded(
        files.counting(6), form="avi", codec="mpeg4", times=[0, 1, 2, 6, 7, 8], options={"bf": "0", "q": "2"}
    )
    assert files.numbers(read(uneven, frames=9)) == [0, 1, 2, 2, 2, 2, 3, 4, 5]
    assert files.numbers(video_io.read_video(uneven)[0]) == [0, 1, 2, 3, 4, 5]


def test_small_a_stream_whose_resolution_changes_is_read():
    larger = np.repeat(np.repeat(files.counting(16)[8:], 2, axis=1), 3, axis=2)
    # MPEG-TS begins two frames late, for the B-frames.
    data = files.coded(files.counting(8), form="mpegts") + files.coded(larger, form="mpegts", times=range(10, 18))
    sizes = [image.shape for image in video_io.iter_frames(data, frames=16, fps=25)]
    assert sizes == [(16, 16, 3)] * 8 + [(32, 48, 3)] * 8
    assert files.numbers(read(data, frames=16)) == list(range(16))
    resized = resizing.resize_video(video_io.iter_frames(data, frames=16, fps=25), height=8, width=8)
    assert resized.shape == (16, 8, 8, 3)
    assert video_io.read_video(data)[0].shape == (16, 16, 16, 3)


def test_small_a_raw_stream_without_times_is_read_at_its_rate():
    data = long_clip(form="h264")
    assert files.numbers(read(data, frames=24)) == list(range(24))
    long = files.coded(np.concatenate([files.counting(24)] * 3), form="h264", options={"g": "8"})
    assert files.numbers(read(long, frames=4, start=2)) == [2, 3, 4, 5]
    assert files.numbers(read(data, frames=4, fps=None)) == [0, 6, 12, 18]


# Damage


@pytest.mark.parametrize(("codec", "at"), [("libx264", 0.5), ("libx265", 0.35)])
def test_small_damage_is_an_error_where_frames_that_are_needed_do_not_decode(codec, at):
    options = {"g": "8"} | ({"x265-params": "log-level=none"} if codec == "libx265" else {})
    video = np.concatenate([files.scene(8, 96, 160)] * 6) + np.random.default_rng(0).integers(0, 25, (48, 96, 160, 3))
    data = files.coded(np.clip(video, 0, 255).astype(np.uint8), codec=codec, options=options)
    bad, cut = files.damaged(data, at=at), data[: len(data) * 2 // 3]
    # What comes before is used.
    assert len(read(bad, frames=8)) == 8
    with pytest.raises(VideoError, match="is damaged at|cannot be read"):
        read(bad, frames=48)
    with pytest.raises(VideoError, match="is damaged at|cannot be read"):
        video_io.read_video(bad)
    with pytest.raises(VideoError, match="cannot be read"):
        read(cut, frames=4)  # its index is at the end


def test_small_a_file_whose_end_is_missing_is_used_as_far_as_it_goes(tmp_path):
    path = tmp_path / "cut.mp4"
    video_io.write_video(path, np.concatenate([files.scene(8, 96, 160)] * 6), fps=25)  # with its index at the beginning
    assert video_io.count_frames(path) == 48
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    assert len(read(path, frames=8)) == 8
    for reader in (
        lambda: read(path, frames=48),
        lambda: video_io.read_video(path),
        lambda: video_io.count_frames(path),
    ):
        with pytest.raises(VideoError, match="is damaged at|cannot be read|ends after"):
            reader()


def test_small_a_frame_whose_packet_yields_nothing_is_damage():
    # The slices of frame 4 are made into units of a reserved kind, which decoders skip without a word.
    data = files.coded(files.counting(12), codec="libx265", options={"x265-params": "log-level=none:bframes=0"})
    container, _, found = files.packets(data)
    slices = bytes(found[4])
    container.close()
    assert data.count(slices) == 1
    lost = data.replace(slices, slices[:4] + bytes([41 << 1]) + slices[5:])
    for reader in (lambda: read(lost, frames=12), lambda: video_io.read_video(lost)):
        with pytest.raises(VideoError, match="is damaged at 0.160 seconds"):
            reader()
    assert files.numbers(read(lost, frames=4)) == [0, 1, 2, 3]


def test_small_a_full_memory_is_not_the_files_fault(tmp_path, monkeypatch):
    data = long_clip()

    def full(*_):
        raise MemoryError("no room for an array")

    monkeypatch.setattr(decoding, "picture", full)
    with pytest.raises(MemoryError, match="no room"):
        read(data)
    monkeypatch.undo()
    path = tmp_path / "locked.mp4"
    path.write_bytes(data)

    def locked(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", locked)
    with pytest.raises(VideoError, match=r"locked.mp4 cannot be opened \(Permission denied\).*: make it readable"):
        read(path)


def prepared_of(data, **options):
    """A source whose every clip is the file `data`."""
    size = dict(fps=25, height=24, width=40) | options
    return files.source_of(data, crop=sources.Crop(8, size["height"], size["width"]), **size)


def test_small_clips_for_training_are_upright_and_images_are_frames_of_them():
    data = files.with_matrix(files.coded(files.scene(50, 96, 160), matrix=5, options={"g": "10"}), files.UPSIDE_DOWN)
    source = prepared_of(data)
    video = source.read(0, np.random.default_rng(0))["video"]
    near(video[3, 2, 30], (0, 0, 251), off=8)
    near(video[3, -2, 10], (251, 0, 0), off=8)
    whole = resizing.resize_video(video_io.iter_frames(data, frames=50, fps=25), height=24, width=40)
    for seed in range(4):
        image = source.image(0, np.random.default_rng(seed))["image"]
        assert sum((image == frame).all() for frame in whole) == 1


# Situations that users of other video readers reported


def test_small_a_cover_picture_is_not_the_video():
    jpeg = files.coded(files.scene(1, 64, 64), form="mjpeg", codec="mjpeg", pix_fmt="yuvj420p", color_range=2)
    data = files.with_cover(long_clip(), jpeg)
    with av.open(io.BytesIO(data)) as container:
        assert [stream.codec_context.name for stream in container.streams.video] == ["mjpeg", "h264"]
    assert files.numbers(read(data, frames=24)) == list(range(24))


def test_small_a_recording_that_states_no_length_is_spread_over_what_it_has():
    # As browsers record: a WebM that was never finished.
    data = files.coded(files.counting(24), form="webm", codec="libvpx-vp9")
    live = files.remuxed(data, "webm", options={"live": "1"})
    with av.open(io.BytesIO(live)) as container:
        assert not container.duration and not container.streams.video[0].duration
    assert files.numbers(read(live, frames=4, fps=None)) == [0, 6, 12, 18]
    assert files.numbers(read(data, frames=4, fps=None)) == [0, 6, 12, 18]


def test_small_transparent_pixels_are_black():
    rgba = np.zeros((3, 32, 32, 4), np.uint8)
    rgba[..., :3] = (0, 200, 0)
    rgba[:, :16, :, 3] = 255
    data = files.coded(rgba, form="mov", codec="qtrle", pix_fmt="argb", rgb="rgba")
    video = read(data, frames=3)
    near(video[0, 4, 4], (0, 200, 0), off=0)
    near(video[0, 28, 4], (0, 0, 0), off=0)


def test_small_a_list_of_files_is_no_video(tmp_path):
    (tmp_path / "secret.mp4").write_bytes(files.coded(files.counting(4)))
    for text in ("ffconcat version 1.0\nfile secret.mp4\n", f"#EXTM3U\n#EXTINF:1,\nfile://{tmp_path}/secret.mp4\n"):
        path = tmp_path / "list.mp4"
        path.write_text(text)
        with pytest.raises(VideoError, match="cannot be read"):
            read(path, frames=2)
        with pytest.raises(VideoError, match="cannot be read"):
            read(text.encode(), frames=2)


def test_small_interlaced_frames_are_read():
    data = files.coded(files.scene(4, 96, 160), options={"x264-params": "tff=1:interlaced=1"}, matrix=1, colorspace=1)
    near(read(data)[0, 4, 80], (251, 0, 0))
    assert len(video_io.read_video(data)[0]) == 4


def test_small_dolby_vision_that_only_its_players_show_is_refused():
    frame = types.SimpleNamespace(colorspace=2, side_data={"DOVI_RPU_BUFFER": b""})
    extras = pictures.Extras.of(frame)
    with pytest.raises(
        VideoError, match="is Dolby Vision without a layer for other players, expected one: convert it: ffmpeg"
    ):
        pictures._yuv(frame, colour.UNSPECIFIED, extras, "x.mp4")
