"""The web page, over HTTP and in a browser: what visitors do, and what they should not be able to do."""

import concurrent.futures
import contextlib
import io
import json
import os
import shutil
import threading
import time
import urllib.error
import urllib.request
import zipfile

import light_cascade
import numpy as np
import pytest
from PIL import Image

from ivideo import main
from ivideo.data import video_io
from ivideo.errors import UserError
from ivideo.sampling.replay import replay
from ivideo.serving import page as serving_page
from ivideo.serving.requests import Studio
from ivideo.serving.resident import ResidentCascade

gradio = pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client")

PROMPT = "a red star moving left on a teal background"
FIRST = {"prompt": PROMPT, "seed": 0, "count": 2, "guidance": "as configured", "steps": 4}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Two stages of a light cascade, and a folder of their weights."""
    folder = tmp_path_factory.mktemp("weights")
    return light_cascade.save(folder, "base", "tsr1", steps=4), str(folder)


@pytest.fixture(scope="module")
def address(weights, tmp_path_factory):
    """The page, served until the end of the module."""
    folder = tmp_path_factory.mktemp("serve")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "files"))
        patch.setattr(serving_page, "MAX_UPLOAD", 1)
        config, path = weights
        studio = Studio(ResidentCascade(config, weights_path=path, to_stage="tsr1"), str(folder))
        page = serving_page.build(gradio, studio)
        serving_page.launch(page)
        yield page.local_url
        page.close()


def connect(address, **options):
    return gradio_client.Client(address, verbose=False, **options)


def upload(address, name: str, content: bytes) -> str:
    """Uploads a file as a browser does. Returns its path on the server."""
    boundary = "frontier"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    body = head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    with urllib.request.urlopen(urllib.request.Request(f"{address}gradio_api/upload", body, kind)) as answer:
        return json.load(answer)[0]


def clip_bytes(tmp_path, frames=30, height=32, width=48):
    path = tmp_path / f"{frames}.mp4"
    pixels = np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)
    video_io.write_video(path, pixels, fps=10)
    return path.read_bytes()


def upsample_clip(address, path):
    """Asks for the clip at this path on the server, as a browser does after an upload. Returns the last event."""
    file = {"path": path, "orig_name": os.path.basename(path), "meta": {"_type": "gradio.FileData"}}
    with ask(address, "clip", [file, PROMPT, 0, "tsr1"]) as events:
        *_, kind, data = (line.partition(": ")[2] for line in events.read().decode().splitlines() if line)
    return kind, data


def ask(address, name, data):
    """Asks for an answer of the page without its client. Returns the stream of events."""
    call = f"{address}gradio_api/call/{name}"
    request = urllib.request.Request(call, json.dumps({"data": data}).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return urllib.request.urlopen(f"{call}/{json.load(answer)['event_id']}")


def test_a_prompt_becomes_videos_and_one_of_them_goes_on(address, weights, tmp_path):
    client = connect(address, download_files=str(tmp_path))
    status, *rest = client.predict(**FIRST, api_name="/first")
    assert status == "Pick one."
    assert [player["visible"] for player in rest[:4]] == [True, True, False, False]
    status, player, recipe = client.predict(api_name="/pick2")
    video = player["value"]
    assert status == "" and json.loads(recipe["value"])["number"] == 1
    assert video_io.read_video(video)[0].shape[0] == 8
    assert replay(video, weights_path=weights[1])["equal"]


def test_picks_of_a_visitor_who_made_nothing_are_refused(address):
    with pytest.raises(Exception, match="the first videos are no longer here: make them again"):
        connect(address).predict(api_name="/pick1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "a" * 100_000}, "100000 characters|1000"),
        ({"seed": -1}, "minimum"),
        ({"count": 40}, "maximum"),
        ({"steps": 1_000_000}, "steps|choices"),
        ({"guidance": "1e9"}, "guidance|choices"),
        ({"guidance": "much"}, "guidance|choices"),
    ],
)
def test_requests_that_the_page_does_not_offer_are_refused(address, change, message):
    with pytest.raises(Exception, match=message):
        connect(address).predict(**{**FIRST, **change}, api_name="/first")


def test_uploads_that_are_no_clips_are_refused(address, tmp_path):
    """A text, a zip and a picture of one pixel named as videos, an empty file, and a clip that is too short."""
    archive, picture = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as f:
        f.writestr("clip.mp4", b"0" * 1000)
    Image.new("RGB", (1, 1)).save(picture, "png")
    for content, message in [
        (b"no video at all", "clip.mp4 cannot be read"),
        (archive.getvalue(), "clip.mp4 cannot be read"),
        (picture.getvalue(), "clip.mp4 ends after 1 of these frames"),
        (b"", "clip.mp4 is empty"),
        (clip_bytes(tmp_path, frames=3), "clip.mp4 ends after 1 of these frames"),
    ]:
        path = upload(address, "clip.mp4", content)
        kind, data = upsample_clip(address, path)
        assert kind == "error" and message in data
        assert os.path.dirname(path) not in data  # the server's folders are nobody's business
    kind, data = upsample_clip(address, upload(address, "clip.mp4", clip_bytes(tmp_path)))
    assert kind == "complete" and json.loads(data)[1]["visible"]


def test_pictures_with_very_many_pixels_are_refused(address):
    picture = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(picture, "png")
    kind, data = upsample_clip(address, upload(address, "large.mp4", picture.getvalue()))
    assert kind == "error" and "frames are 10000" in data and "at most 9.4 million pixels" in data


def test_uploads_that_are_too_large_are_refused(address):
    with pytest.raises(urllib.error.HTTPError) as e:
        upload(address, "large.mp4", b"0" * (2 * 2**20))
    assert e.value.code == 413


def test_nothing_outside_the_pages_folder_is_read_or_written(address, tmp_path):
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(clip_bytes(tmp_path))
    assert upsample_clip(address, str(secret))[0] == "error"
    for path in (str(secret), "/etc/passwd", "../../../../etc/passwd"):
        with pytest.raises(urllib.error.HTTPError) as e:
            urllib.request.urlopen(f"{address}gradio_api/file={path}")
        assert e.value.code in (403, 404)
    stored = upload(address, "../../../escaped.mp4", b"0")
    assert os.path.realpath(stored).startswith(os.path.realpath(os.environ["GRADIO_TEMP_DIR"]) + os.sep)


def test_twenty_visitors_at_once_are_served_one_after_another(address):
    """Each gets the video of its own seed."""
    clients = [connect(address) for _ in range(20)]

    def visit(number):
        status, *_ = clients[number].predict(**{**FIRST, "seed": number, "count": 1}, api_name="/first")
        *_, recipe = clients[number].predict(api_name="/pick1")
        return status, json.loads(recipe["value"])["seed"]

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        assert list(pool.map(visit, range(20))) == [("Pick one.", number) for number in range(20)]


def test_an_error_of_the_server_is_said_and_the_next_visitor_is_served(address, monkeypatch, caplog):
    def fails(*_, **__):
        raise RuntimeError("<b>a bug</b>")

    with monkeypatch.context() as patch:
        patch.setattr(ResidentCascade, "sample", fails)
        with ask(address, "first", list(FIRST.values())) as events:
            said = events.read().decode()
    assert "the server failed at this request, and its log says why" in said and "bug" not in said
    assert "a request failed" in caplog.text
    assert connect(address).predict(**FIRST, api_name="/first")[0] == "Pick one."


def test_messages_are_no_html(address, monkeypatch):
    def fails(*_, **__):
        raise UserError("<img src=x>")

    monkeypatch.setattr(ResidentCascade, "sample", fails)
    with ask(address, "first", list(FIRST.values())) as events:
        assert "&lt;img src=x&gt;" in events.read().decode()


def test_a_visitor_who_leaves_stops_the_work(address, monkeypatch):
    """The next visitor waits for a step, and not for the whole."""
    from ivideo.serving import resident

    stopped, begun = threading.Event(), threading.Event()
    reporting = resident.ResidentCascade._reporting

    @contextlib.contextmanager
    def slow(self, on_step):
        def slowly(phase, step):
            begun.set()
            time.sleep(2)
            try:
                on_step(phase, step)
            except BaseException:
                stopped.set()
                raise

        with reporting(self, slowly):
            yield

    monkeypatch.setattr(resident.ResidentCascade, "_reporting", slow)
    with ask(address, "first", list(FIRST.values())) as events:
        assert begun.wait(60)
        events.readline()
    assert stopped.wait(20)


def test_small_port_that_is_taken(capsys, command_line, weights):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        assert main.main(["ivideo", "--config=configs/base.py:small", "--mode=serve", f"--port={port}"]) == 2
    assert f"--port={port} cannot be used on 127.0.0.1 (Address already in use): choose another" in (
        capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright and Chromium")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def open_page(browser, address):
    page = browser.new_page()
    page.goto(address)
    page.wait_for_selector("#make")
    return page


def make_first(page, prompt=PROMPT):
    page.get_by_label("Prompt").first.fill(prompt)
    page.click("#make")


def wait_for_text(page, selector, text):
    page.wait_for_function(
        "([selector, text]) => document.querySelector(selector)?.innerText.includes(text)", arg=[selector, text]
    )


def test_a_person_types_picks_plays_and_downloads(address, browser, weights, tmp_path):
    page = open_page(browser, address)
    make_first(page)
    wait_for_text(page, "#status", "Pick one.")
    page.wait_for_selector("#first3 video")
    page.click("#pick2")
    page.wait_for_selector("#result video")
    playing = "() => { const v = document.querySelector('#result video'); return v && v.currentTime > 0 }"
    page.wait_for_function(playing)
    with page.expect_download() as download:
        page.click("#result a[download], #result button[aria-label*='ownload']")
    path = str(tmp_path / "download.mp4")
    download.value.save_as(path)
    assert download.value.suggested_filename == "a-red-star-moving-left-on-a-teal-backgro-0-2.mp4"
    assert replay(path, weights_path=weights[1])["equal"]
    page.close()


def test_a_refused_upload_says_why(address, browser, tmp_path):
    (tmp_path / "no-video.mp4").write_bytes(b"no video at all")
    page = open_page(browser, address)
    page.get_by_role("tab", name="From your own clip").click()
    page.set_input_files("#clip input[type=file]", str(tmp_path / "no-video.mp4"))
    page.wait_for_selector("#clip .file-preview, #clip table")
    page.click("#upsample_clip")
    page.wait_for_selector("text=no-video.mp4 cannot be read")
    page.close()


def test_two_people_and_a_reload_in_mid_run(address, browser):
    """The one who reloads can begin again, and the other one is served."""
    one, other = open_page(browser, address), open_page(browser, address)
    make_first(one)
    one.wait_for_function("() => document.querySelector('#status').innerText != ''")
    make_first(other, "a blue circle")
    one.reload()
    one.wait_for_selector("#make")
    wait_for_text(other, "#status", "Pick one.")
    make_first(one)
    wait_for_text(one, "#status", "Pick one.")
    one.close()
    other.close()
