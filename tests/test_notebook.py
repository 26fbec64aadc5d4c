"""The notebooks: no outputs in the repository, and every cell runs on the CPU at a small size."""

import ast
import os
import pathlib
import re

import nbclient
import nbformat
import pytest
import time_notebook

from ivideo.data import video_io

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("no_garbage")
NOTEBOOKS = sorted((ROOT / "launch").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_small_notebook_has_no_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 60_000
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            ast.parse(cell.source)


def run(name, folder, monkeypatch):
    """Executes a notebook of this name at its small size. Returns its cells, and all that they print."""
    notebook = nbformat.read(ROOT / "launch" / f"{name}.ipynb", as_version=4)
    time_notebook.set_size(notebook, "small")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"))
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    (shown,) = [cell for cell in notebook.cells if "plt.semilogy" in cell.source]
    assert "image/png" in shown.outputs[-1].data
    programs = [path.name for path in folder.glob("*/programs/jit_train_step*-cache")]
    assert len(programs) == 1, f"every piece of the training runs the same program, but there are {programs}"
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


def test_demo_runs_from_an_empty_folder(tmp_path, monkeypatch):
    texts = run("colab_demo", tmp_path, monkeypatch)
    assert "'phase': '8'" in texts and "held-out" in texts
    results = tmp_path / "ivideo_notebook"
    assert sorted(path.name for path in (results / "base" / "checkpoints").iterdir())[-1] == "6"
    assert (results / "distilled" / "8" / "weights.safetensors").exists()
    assert [path for path in tmp_path.iterdir()] == [results]


def test_training_on_clips_runs_from_an_empty_folder_and_continues(tmp_path, monkeypatch):
    """Of the 24 clips those that stand still are left out. Run again, nothing is prepared or trained."""
    first, again = run("colab_train", tmp_path, monkeypatch), run("colab_train", tmp_path, monkeypatch)
    assert "24 captions" in first and re.search(r"left out \d: .*\d still", first)
    assert "is finished already" in again
    results = tmp_path / "ivideo_training"
    assert sorted(path.name for path in (results / "base" / "checkpoints").iterdir())[-1] == "6"
    assert video_io.count_frames(results / "sampled.mp4") == 4
    assert [path for path in tmp_path.iterdir()] == [results]
