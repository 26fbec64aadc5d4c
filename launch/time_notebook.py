"""Executes a notebook in an empty folder, and prints how long each cell took.

  pip install -e '.[test]' && python launch/time_notebook.py launch/colab_demo.ipynb FOLDER [--size=small]

FOLDER must not exist. It gets the notebook's results, and the notebook with its outputs, also where a cell fails.
"""

import argparse
import datetime
import pathlib
import re
import sys

import nbclient
import nbformat


def set_size(notebook, size: str) -> None:
    """Sets SIZE in the cell of settings."""
    (settings,) = [cell for cell in notebook.cells if cell.cell_type == "code" and "\nSOURCE = " in cell.source]
    settings.source = re.sub('SIZE = "[a-z]+"', f'SIZE = "{size}"', settings.source)


def seconds(cell) -> float | None:
    """The wall time of a cell, or None if it was not executed to its end."""
    times = cell.metadata.get("execution", {})
    if "shell.execute_reply" not in times:
        return None
    begin, end = times["iopub.execute_input"], times["shell.execute_reply"]
    return (datetime.datetime.fromisoformat(end) - datetime.datetime.fromisoformat(begin)).total_seconds()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--size", help="instead of the notebook's SIZE")
    args = parser.parse_args()
    if args.folder.exists():
        sys.exit(f"{args.folder} exists, expected a new folder: choose another name")
    notebook = nbformat.read(args.notebook, as_version=4)
    if args.size:
        set_size(notebook, args.size)
    args.folder.mkdir(parents=True)
    client = nbclient.NotebookClient(
        notebook, timeout=None, record_timing=True, resources={"metadata": {"path": str(args.folder)}}
    )
    try:
        client.execute()
    finally:
        nbformat.write(notebook, args.folder / args.notebook.name)
        heading, total = "", 0.0
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                heading = next((line for line in cell.source.splitlines() if line.startswith("#")), heading)
            elif (taken := seconds(cell)) is not None:
                total += taken
                print(f"{taken:8.1f} s  {heading.lstrip('# '):32}  {cell.source.splitlines()[0][:50]}")
        print(f"{total:8.1f} s  in all")


if __name__ == "__main__":
    main()
