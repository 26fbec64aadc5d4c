"""The notebook: no outputs in the repository, and every cell runs on the CPU at a small size."""

import ast
import os
import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOK = ROOT / "launch" / "colab_demo.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_small_notebook_has_no_outputs(notebook):
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 60_000
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            ast.parse(cell.source)


def test_notebook_runs_from_an_empty_folder_and_continues(notebook, tmp_path, monkeypatch):
    """Run again, it trains and distils nothing, since both are finished."""
    (settings,) = [cell for cell in notebook.cells if cell.source.startswith('SIZE = "demo"')]
    settings.source = settings.source.replace('SIZE = "demo"', 'SIZE = "small"')
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"))
    for _ in range(2):
        nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
        (shown,) = [cell for cell in notebook.cells if "plt.semilogy" in cell.source]
        assert "image/png" in shown.outputs[-1].data
        texts = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
        assert "'phase': '8'" in texts and "held-out" in texts
        results = tmp_path / "ivideo_notebook"
        assert sorted(path.name for path in (results / "base" / "checkpoints").iterdir())[-1] == "6"
        assert (results / "distilled" / "8" / "weights.safetensors").exists()
        assert [path for path in tmp_path.iterdir()] == [results]
