"""The web page's work: requests and their limits, cascades that stay in memory, jobs that are stopped."""

import os
import threading
import time

import light_cascade
import light_network
import numpy as np
import pytest
from shared_programs import random_params

from configs import base
from ivideo import stages
from ivideo.data import video_io
from ivideo.errors import UserError
from ivideo.prompts import samples
from ivideo.sampling import cascade, recipes
from ivideo.sampling.replay import replay
from ivideo.serving.jobs import Job, Remaining, Stopped
from ivideo.serving.requests import MAX_PIXELS, MAX_SEED, First, Studio, check_size, slug
from ivideo.serving.resident import ResidentCascade
from ivideo.weights import config_metadata, load_params, save_params

PROMPT = "a red star moving left on a teal background"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The first three stages of a light cascade, and a folder of their weights."""
    folder = tmp_path_factory.mktemp("weights")
    return light_cascade.save(folder, "base", "tsr1", "ssr1", steps=4), str(folder)


def resident(exported, **options):
    config, weights = exported
    return ResidentCascade(config, weights_path=weights, **{"to_stage": "tsr1", **options})


@pytest.fixture(scope="module")
def base_and_tsr1(exported):
    return resident(exported)


@pytest.fixture
def studio(base_and_tsr1, tmp_path):
    return Studio(base_and_tsr1, str(tmp_path))


def idle_job():
    return Job(lambda job: None)


def test_small_a_job_ends_with_its_result():
    job = Job(lambda job: job.report("half") or 7)
    assert set(job.updates()) <= {"half"}
    assert job.result == 7


def test_small_the_error_of_a_job_is_raised():
    def work(job):
        raise UserError("a wrong request")

    with pytest.raises(UserError, match="a wrong request"):
        list(Job(work).updates())


def test_small_a_job_whose_reader_goes_away_is_stopped():
    begun = threading.Event()

    def work(job):
        while True:
            job.report("going on")
            begun.set()

    job = Job(work)
    updates = job.updates()
    assert next(updates) == "going on"
    updates.close()
    assert job._done.wait(10) and isinstance(job.error, Stopped)


def test_small_time_that_remains():
    """Five steps of two seconds after a minute of compilation, and then a stage that took ten seconds before."""
    now = 0.0
    remaining = Remaining([None, 10.0], clock=lambda: now)
    now = 60.0
    assert remaining.before(1, 5) == ""  # the time of a step is not known yet
    now = 62.0
    assert remaining.before(2, 5) == "about 18 s left"
    now = 68.0
    assert remaining.before(5, 5) == "about 12 s left"
    remaining.end()
    now = 71.0
    assert remaining.before(1, 4) == "about 10 s left"
    assert Remaining([1.0, None]).before(1, 1) == ""


def test_small_names_of_files():
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("A star, which moves to the right, and then to the left") == "a-star-which-moves-to-the-right-and-then"
    assert slug("星") == slug("") == "video"


def test_small_requests_that_are_refused(base_and_tsr1, tmp_path):
    (tmp_path / "words.txt").write_text("weapon\n")
    studio, job = Studio(base_and_tsr1, str(tmp_path), blocked_words=str(tmp_path / "words.txt")), idle_job()
    valid = {"prompt": PROMPT, "seed": 0, "count": 1, "guidance": None, "steps": 4}
    for change, message in [
        ({"prompt": "a" * 100_000}, "the prompt has 100000 characters, expected at most 1000"),
        ({"prompt": "a weapon"}, "^the prompt has a word that this page does not allow: change the prompt$"),
        ({"seed": -1}, "the seed is -1, expected a whole number from 0"),
        ({"seed": 0.5}, "the seed is 0.5"),
        ({"seed": None}, "the seed is empty"),
        ({"seed": float("nan")}, "the seed is nan"),
        ({"seed": float("inf")}, "the seed is inf"),
        ({"seed": MAX_SEED + 1}, "the seed is"),
        ({"count": 5}, "5 videos were asked for, expected 1 to 4"),
        ({"guidance": -1.0}, "a guidance of -1.0 was asked for, expected 0 to"),
        ({"guidance": float("nan")}, "a guidance of nan was asked for"),
        ({"guidance": 1e9}, "a guidance of 1000000000.0 was asked for"),
        ({"steps": 3}, "3 steps were asked for, expected one of 1, 2, 4"),
    ]:
        with pytest.raises(UserError, match=message):
            studio.first(job, **{**valid, **change})
    with pytest.raises(UserError, match="stage 'ssr3' takes no clip: choose one of tsr1"):
        studio.enlarged(job, "clip.mp4", PROMPT, 0, "ssr3")
    assert os.listdir(tmp_path) == ["words.txt"]


def test_small_a_student_is_asked_for_what_it_was_distilled_for(tmp_path):
    """The range saved with its weights counts, not a wider one of the config that the page is started with."""
    original = base.get_config("small")
    original.update_from_flattened_dict(light_network.OPTIONS)
    original.sample.steps = 64
    for config, largest, steps in ((original, 16.0, [16, 32, 64]), (stages.distilled(original), 3.0, [2])):
        config.distill.w_max = 3.0
        path = str(tmp_path / f"{config.phase or 'original'}.safetensors")
        save_params(path, random_params(config, scale=0.15), metadata=config_metadata(config), dtype=np.float32)
        config.distill.w_max = 16.0
        studio = Studio(ResidentCascade(config, weights_path=path), str(tmp_path))
        assert studio.cascade.guidance_range == (0.0, largest) and studio.steps() == steps
        with pytest.raises(UserError, match=f"a guidance of 16.5 was asked for, expected 0 to {largest:g}$"):
            studio.first(idle_job(), PROMPT, 0, 1, 16.5, steps[0])


def test_small_clips_that_are_too_large_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    video_io.write_video(path, np.zeros((2, 32, 48, 3), np.uint8), fps=8)
    assert video_io.read_size(path) == (32, 48)
    check_size(str(path))
    monkeypatch.setattr(video_io, "read_size", lambda path: (10_000, 10_000))
    with pytest.raises(UserError, match="the clip's frames are 10000×10000, expected at most 9.4 million pixels"):
        check_size(str(path))
    assert MAX_PIXELS == 9_437_184


def test_a_resident_stage_samples_as_any_other(exported, base_and_tsr1):
    config, weights = exported
    stage, steps = config.stages.base, []
    seeds = [row.noise for row in samples([PROMPT], seed=3, num_videos=2)]
    found = base_and_tsr1.sample(
        stage, [PROMPT] * 2, seeds=seeds, size=2, on_step=lambda phase, step: steps.append((phase, step))
    )
    assert steps == [("compiling", 0), *(("sampling", i) for i in (1, 2, 3, 4))]
    params = load_params(f"{weights}/base.safetensors", random_params(stage))
    wanted = cascade.sample_stage(stage, params, [PROMPT] * 2, seeds=seeds)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert base_and_tsr1.seconds(stage, 2) > 0 and base_and_tsr1.seconds(stage, 3) is None
    # A second time nothing is loaded or compiled
    program, kept = base_and_tsr1._program(stage, 2), base_and_tsr1._params
    before = list(kept)
    np.testing.assert_array_equal(base_and_tsr1.sample(stage, [PROMPT] * 2, seeds=seeds, size=2), found)
    assert base_and_tsr1._program(stage, 2) is program and list(kept) == before and len(program._compiled) == 1


def test_small_a_stopped_request_ends_at_its_step_and_the_next_is_served(base_and_tsr1):
    stage = base_and_tsr1.configs[0]
    seen = []

    def on_step(phase, step):
        seen.append(step)
        if step == 2:
            raise Stopped

    with pytest.raises(Stopped):
        base_and_tsr1.sample(stage, [""], seeds=[(0, 0)], size=2, on_step=on_step)
    assert seen == [0, 1, 2]
    assert base_and_tsr1.sample(stage, [""], seeds=[(0, 0)], size=2).shape == (1, 4, 8, 8, 3)


def test_videos_of_the_page_are_made_again_from_their_files(exported, studio):
    """The second of three first videos, with other steps and guidance, and the upsampled one: bit for bit."""
    row = studio.first(idle_job(), PROMPT, 5, 3, 1.5, 2)
    assert row.videos.shape == (3, 4, 8, 8, 3)
    small, large = studio.write_first(row, 1), studio.upsampled(idle_job(), row, 1)
    found = recipes.read(large)
    assert (found["prompt"], found["seed"], found["number"], found["stages"]) == (PROMPT, 5, 1, "base tsr1")
    assert found["changes"]["stages.base.sample.weight"] == 1.5
    for path in (small, large):
        assert replay(path, weights_path=exported[1])["equal"]
    hour_ago = time.time() - 3601
    os.utime(os.path.dirname(small), (hour_ago, hour_ago))
    newest = studio.write_first(row, 0)
    assert [os.path.exists(path) for path in (small, large, newest)] == [False, True, True]


def test_a_clip_of_the_visitor_is_upsampled(exported, studio, tmp_path):
    path = str(tmp_path / "clip.mp4")
    video_io.write_video(path, np.random.default_rng(0).integers(0, 256, (30, 64, 48, 3), np.uint8), fps=10)
    job = Job(lambda job: studio.enlarged(job, path, PROMPT, 1, "tsr1"))
    list(job.updates())
    assert video_io.read_video(job.result)[0].shape[0] == 8
    assert replay(job.result, clip=path, weights_path=exported[1])["equal"]


def test_old_programs_are_dropped(exported, monkeypatch):
    monkeypatch.setattr("ivideo.serving.resident.MAX_PROGRAMS", 2)
    cascade = resident(exported)
    stage = cascade.configs[0]
    first = cascade._program(stage, 1)
    cascade._program(stage, 2)
    assert cascade._program(stage, 1) is first
    cascade._program(stage, 3)
    assert cascade._program(stage, 1) is first and len(cascade._programs) == 2


def test_small_a_list_of_words_that_is_missing_is_an_error_at_the_start(base_and_tsr1, tmp_path):
    with pytest.raises(UserError, match=r"--blocked_words=\S*none.txt cannot be read"):
        Studio(base_and_tsr1, str(tmp_path), blocked_words=str(tmp_path / "none.txt"))


def test_small_a_video_that_cannot_be_stored_leaves_nothing(base_and_tsr1, studio, tmp_path, monkeypatch):
    def write(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video_io, "write_video", write)
    stage = base_and_tsr1.configs[0]
    row = First(stage, 0, samples([PROMPT], seed=0), np.zeros((1, 4, 8, 8, 3), np.float32))
    with pytest.raises(UserError, match="the server could not store the video .No space left on device."):
        studio.write_first(row, 0)
    assert os.listdir(tmp_path) == []


def test_small_a_filter_refuses_videos(base_and_tsr1, tmp_path, monkeypatch):
    """Those of a row that it allows are kept, with their numbers. If it allows none, that is said."""
    answers = []
    monkeypatch.setattr("ivideo.sampling.filters.load_video_filter", lambda name: lambda *_: answers.pop(0))
    studio = Studio(base_and_tsr1, str(tmp_path), video_filter="module:function")
    whole = Studio(base_and_tsr1, str(tmp_path)).first(idle_job(), PROMPT, 0, 3, None, 4)
    answers += [True, False, True]
    row = studio.first(idle_job(), PROMPT, 0, 3, None, 4)
    assert [one.number for one in row.rows] == [0, 2]
    np.testing.assert_array_equal(row.videos, whole.videos[[0, 2]])
    answers += [False, False]
    with pytest.raises(UserError, match="the filter of videos refused all 2 videos: try another prompt or seed"):
        studio.first(idle_job(), PROMPT, 0, 2, None, 4)
    answers += [False]
    with pytest.raises(UserError, match="the filter of videos refused the video: try another prompt or seed"):
        studio.upsampled(idle_job(), row, 1)
