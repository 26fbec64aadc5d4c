"""Runs the tasks of mode prepare_data with Apache Beam: on this machine, Dataflow, Flink or Spark.

All workers must see the input and the set's folder: in a bucket (gs://…) or in a shared folder. Each task runs in a
process of its own on a worker, so that a decoder that crashes or hangs ends only that process.
"""

import functools
import os
import pickle
from collections.abc import Callable, Iterator

from ivideo import files
from ivideo.data.preparing import pool
from ivideo.data.preparing.prepare import WORK
from ivideo.errors import UserError

try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
except ImportError as e:
    raise UserError("Apache Beam is not installed: run `pip install '.[beam]'` in the clone") from e

TASKS = "tasks.pickle"  # in WORK. A pipeline may have no more than 10 MB, so it has only the places of the tasks


def spread(options: list[str], out: str) -> Callable:
    """What `prepare.prepare` calls to run tasks, with Beam's options, such as --runner=DataflowRunner.

    UserError where Beam rejects the options.
    """
    try:
        beam.Pipeline(options=PipelineOptions(options))
    except (ValueError, OSError) as e:
        raise UserError(f"Beam rejects --beam={' --beam='.join(options)} ({e}): correct them") from e

    def on_workers(function: Callable, tasks: list) -> Iterator:
        """Runs `function([task], run)` for each task. All are yielded when the last one is done."""
        if not tasks:
            return
        path, spans, begin = os.path.join(out, WORK, TASKS), [], 0
        with files.atomic_write(path) as temporary, open(temporary, "wb") as f:
            for task in tasks:
                f.write(pickle.dumps(task))
                spans.append((begin, f.tell()))
                begin = f.tell()
        with beam.Pipeline(options=PipelineOptions(options)) as pipeline:
            _ = pipeline | beam.Create(spans) | beam.Reshuffle() | beam.ParDo(_Run(function, path))
        yield from tasks

    return on_workers


class _Run(beam.DoFn):
    """Runs the task at an element's place in a file."""

    def __init__(self, function: Callable, path: str):
        self._function, self._path = function, path

    def process(self, span):
        task = pickle.loads(files.read_bytes(self._path, *span))
        yield sum(1 for _ in self._function([task], functools.partial(pool.run, processes=1)))
