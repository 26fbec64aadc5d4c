"""The web page: a prompt gives a row of small videos, and the one that is picked goes through the later stages."""

import functools
import html
import json
import logging
import os
import random
import signal
import socket
import sys
import tempfile
import threading

from ivideo.errors import UserError
from ivideo.sampling import recipes
from ivideo.serving.jobs import Job, Stopped
from ivideo.serving.requests import KEPT, MAX_PROMPT, MAX_SEED, MAX_UPLOAD, MAX_VIDEOS, Studio
from ivideo.serving.resident import ResidentCascade

log = logging.getLogger("ivideo")
ADDRESS = "127.0.0.1"
MAX_WAITING = 20  # visitors in the queue; one is served at a time
DEFAULT, WEIGHTS = "as configured", (0, 1, 2, 4, 8, 15)  # of guidance
DEVICES = "devices"  # the name of the queue of all that uses the devices
CSS = ".status {min-height: 1.6em} footer {display: none !important}"


def serve(
    config,
    *,
    port: int,
    share: bool = False,
    workdir: str | None = None,
    weights_path: str | None = None,
    from_stage: str | None = None,
    to_stage: str | None = None,
    blocked_words: str | None = None,
    video_filter: str | None = None,
) -> None:
    """Serves the page on this machine until Ctrl-C or a signal to end.

    `share`: also through a public link of Gradio's. The others as in `generate`. All files are in a temporary folder
    that is deleted at the end. UserError, before anything is loaded, if Gradio is not installed, if the port is taken,
    or as from `ResidentCascade`.
    """
    _check_port(port)
    ended = threading.Event()  # set by a signal, also while weights are loaded: then the page ends as soon as it begins
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with tempfile.TemporaryDirectory(prefix="ivideo_serve_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = os.path.join(folder, "files")  # read when gradio is imported
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        gradio = _gradio()
        cascade = ResidentCascade(
            config, workdir=workdir, weights_path=weights_path, from_stage=from_stage, to_stage=to_stage
        )
        studio = Studio(cascade, folder, blocked_words=blocked_words, video_filter=video_filter)
        page = build(gradio, studio)
        launch(page, port=port, share=share)
        if share and not page.share_url:
            raise UserError("--share: Gradio's server gave no link: check this machine's network, or leave it out")
        print(f"http://{ADDRESS}:{port}", *([page.share_url] if share else []), flush=True)
        while not ended.wait(1):  # the main thread handles signals between two waits
            pass
        page.close(verbose=False)
    # A normal exit would wait for a thread that compiles or samples, and abort where it cannot end
    sys.stdout.flush()
    logging.shutdown()
    os._exit(0)


def launch(page, *, port: int | None = None, share: bool = False) -> None:
    """Serves a page in threads of its own, on a free port if none is given."""
    page.launch(
        server_name=ADDRESS, server_port=port, share=share, quiet=True, prevent_thread_lock=True, css=CSS,
        max_file_size=f"{MAX_UPLOAD}mb", footer_links=[], enable_monitoring=False,
    )  # fmt: skip


def _check_port(port: int) -> None:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((ADDRESS, port))
        except OSError as e:
            raise UserError(f"--port={port} cannot be used on {ADDRESS} ({e.strerror}): choose another") from e


def _gradio():
    try:
        import gradio
    except ImportError as e:
        raise UserError("Gradio, for mode serve, is not installed: run `pip install '.[serve]'` in the clone") from e
    return gradio


def build(gr, studio: Studio):
    """The page as Gradio's Blocks. `gr`: the module gradio."""
    with gr.Blocks(title="ivideo", analytics_enabled=False, delete_cache=(KEPT // 4, KEPT)) as page:
        gr.Markdown(_heading(studio))
        if studio.starts_from_text:
            with gr.Tab("From a prompt"):
                _prompt_tab(gr, studio)
        if studio.enlarging:
            with gr.Tab("From your own clip"):
                _clip_tab(gr, studio)
    # One visitor at a time has the devices, whatever was asked for
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


def _heading(studio) -> str:
    first, last = studio.cascade.configs[0], studio.cascade.configs[-1]
    size = last.video
    text = f"# ivideo\nVideos of {size.frames} frames, {size.width}×{size.height}, {size.fps} per second"
    if first is last:
        return f"{text}, from stage {last.stage}."
    return f"{text}, from {len(studio.cascade.configs)} stages: {first.stage} to {last.stage}."


def _prompt_tab(gr, studio):
    stages = studio.cascade.configs
    prompt, seed = _inputs(gr)
    with gr.Row():
        another = gr.Button("Another seed", size="sm")
        count = gr.Slider(1, MAX_VIDEOS, value=MAX_VIDEOS, step=1, label="Videos")
        low, high = studio.cascade.guidance_range
        weights = [w for w in WEIGHTS if low <= w <= high]
        guidance = gr.Dropdown([DEFAULT, *map(str, weights)], value=DEFAULT, label="Guidance weight")
        steps = gr.Dropdown(studio.steps(), value=stages[0].sample.steps, label="Sampling steps")
    with gr.Row():
        make = gr.Button("Make first videos", variant="primary", elem_id="make")
        stop = gr.Button("Stop", elem_id="stop")
    status = gr.Markdown(elem_classes="status", elem_id="status")
    made = gr.State(None, time_to_live=KEPT)
    players, picks = [], []
    with gr.Row():
        for number in range(MAX_VIDEOS):
            with gr.Column(min_width=160):
                players.append(_player(gr, f"Video {number + 1}", visible=False, elem_id=f"first{number}"))
                picks.append(gr.Button("Upsample this one", visible=False, elem_id=f"pick{number}"))
    result = _result(gr)
    all_outputs, result_outputs = [status, made, *players, *picks, *result], [status, *result]

    def first(prompt, seed, count, guidance, steps):
        def work(job):
            weight = None if guidance == DEFAULT else float(guidance)
            row = studio.first(job, prompt, seed, int(count), weight, int(steps))
            paths = [studio.write_first(row, number) for number in range(len(row.videos))]
            several, absent = len(stages) > 1, [None] * (MAX_VIDEOS - len(paths))
            return (
                "Pick one." if several else "",
                row,
                *(gr.update(value=path, visible=path is not None) for path in [*paths, *absent]),
                *(gr.update(visible=several and number < len(paths)) for number in range(MAX_VIDEOS)),
                *(gr.update(value=None, visible=False) for _ in result),
            )

        yield from _answer(gr, work, all_outputs)

    def upsample(number, row):
        def work(job):
            if row is None or number >= len(row.videos):
                raise UserError("the first videos are no longer here: make them again")
            return _shown(gr, studio.upsampled(job, row, number))

        yield from _answer(gr, work, result_outputs)

    options = {"concurrency_id": DEVICES, "show_progress": "hidden"}
    events = [make.click(first, [prompt, seed, count, guidance, steps], all_outputs, api_name="first", **options)]
    for number, pick in enumerate(picks):
        handler, name = functools.partial(upsample, number), f"pick{number + 1}"
        events.append(pick.click(handler, made, result_outputs, api_name=name, **options))
    another.click(lambda: random.randrange(2**31), outputs=seed, queue=False, api_visibility="private")
    _stops(stop, events, status)


def _clip_tab(gr, studio):
    file = gr.File(label=f"A video file of up to {MAX_UPLOAD} MB", file_types=["video", ".gif"], elem_id="clip")
    prompt, seed = _inputs(gr)
    sizes = [
        (f"{c.stage}: {c.cond.frames} frames of {c.cond.width}×{c.cond.height}, {c.cond.fps} per second", c.stage)
        for c in studio.enlarging
    ]
    from_stage = gr.Dropdown(sizes, value=sizes[0][1], label="First stage and its input")
    with gr.Row():
        make = gr.Button("Upsample the clip", variant="primary", elem_id="upsample_clip")
        stop = gr.Button("Stop")
    status = gr.Markdown(elem_classes="status", elem_id="clip_status")
    outputs = [status, *_result(gr, "clip_")]

    def clip(path, prompt, seed, from_stage):
        def work(job):
            if not path:
                raise UserError("choose a video file first")
            return _shown(gr, studio.enlarged(job, path, prompt, seed, from_stage))

        yield from _answer(gr, work, outputs, path=path)

    event = make.click(
        clip, [file, prompt, seed, from_stage], outputs, concurrency_id=DEVICES, show_progress="hidden",
        api_name="clip",
    )  # fmt: skip
    _stops(stop, [event], status)


def _inputs(gr):
    """The fields that both tabs have."""
    prompt = gr.Textbox(
        label="Prompt", max_length=MAX_PROMPT, placeholder="a yellow star moving right on a teal background"
    )
    seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, maximum=MAX_SEED)
    return prompt, seed


def _player(gr, label, **options):
    return gr.Video(label=label, interactive=False, autoplay=True, loop=True, buttons=["download"], **options)


def _result(gr, prefix=""):
    """The fields of a finished video."""
    player = _player(gr, "The whole video", visible=False, elem_id=f"{prefix}result")
    recipe = gr.Code(
        label="Its recipe, which the file contains: --mode=replay makes the video again from it", language="json",
        visible=False, interactive=False, elem_id=f"{prefix}recipe",
    )  # fmt: skip
    return player, recipe


def _shown(gr, path):
    """The updates of the status and of the fields of `_result` for a finished video."""
    recipe = json.dumps(recipes.read(path), indent=1)
    return "", gr.update(value=path, visible=True), gr.update(value=recipe, visible=True)


def _stops(button, events, status):
    button.click(lambda: "Stopped.", outputs=status, cancels=events, queue=False, api_visibility="private")


def _answer(gr, work, outputs, path: str | None = None):
    """Runs `work` as a job. Yields its reports in the first of the outputs, and then all outputs, which it returns.

    Shows a visitor what is wrong with a request, in which an uploaded file has the name that the visitor knows, and not
    its `path` on this machine.
    """
    job = Job(work)
    others = [gr.skip() for _ in outputs[1:]]
    try:
        for report in job.updates():
            yield (report, *others)
        yield job.result
        return
    except Stopped:
        return
    except (UserError, FloatingPointError) as e:
        error, text = e, str(e).replace(path, os.path.basename(path)) if path else str(e)
    except Exception as e:  # a visitor cannot mend it, and should not wait for it
        log.exception("a request failed")
        error, text = e, "the server failed at this request, and its log says why"
    yield ("", *others)
    raise gr.Error(html.escape(text, quote=False), print_exception=False) from error
