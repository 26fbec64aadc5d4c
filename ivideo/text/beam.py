"""Text caches of very large sets of captions, by Apache Beam: on this machine, or on Dataflow, Flink or Spark.

The cache is that of `ivideo.text.cache`, with as many shards as are asked for; each is made by one worker, whose
processes load the encoder once. Captions, encoder and cache lie where all workers see them: in a bucket (gs://…), or in
a folder that they share. A file pattern stands for the captions.
"""

import json

import apache_beam as beam
import ml_collections
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.utils.shared import Shared

from ivideo import files
from ivideo.text import cache, fingerprint, load_encoder


def encode_captions(config, pattern: str, out: str, *, shards: int, options: list[str]) -> None:
    """Makes the cache of all lines of the files that match, and of the config's sample prompts.

    `options` are Beam's, such as --runner=DataflowRunner; none runs it here. Shards that are there already are left as
    they are, so the same call again goes on where it was stopped. UserError where the encoder cannot be read, or `out`
    is of others; Beam's own errors for captions that are not UTF-8.
    """
    cache.begin(out, config.text, fingerprint(config.text), shards=shards, of=pattern)
    with beam.Pipeline(options=PipelineOptions(options)) as pipeline:
        lines = pipeline | "read" >> beam.io.ReadFromText(pattern)
        prompts = pipeline | "sample prompts" >> beam.Create(list(config.train.sample_prompts))
        _ = (
            (lines, prompts)
            | beam.Flatten()
            | beam.Map(str.strip)
            | beam.Filter(bool)
            | beam.Distinct()
            | beam.Map(lambda caption: (cache.shard_of(cache.key_of(caption), shards), caption))
            | beam.GroupByKey()
            | beam.ParDo(_Encode(config.to_json(), out, shards))
        )
    for i in range(shards):  # few captions leave some empty
        if not files.exists(cache.shard_path(out, i, shards)):
            cache.write_shard(out, i, shards, [], None, batch=1)
    count, size = cache.finish(out)
    print(cache.summary(out, count, size))


class _Encode(beam.DoFn):
    """Writes shards (number, captions)."""

    def __init__(self, config: str, out: str, shards: int):
        self._config, self._out, self._shards = config, out, shards
        self._shared = Shared()  # the encoder, by all threads of a process

    def setup(self):
        self._text = ml_collections.ConfigDict(json.loads(self._config)).text
        self._encoder = self._shared.acquire(lambda: load_encoder(self._text))

    def process(self, element):
        i, captions = element
        if not files.exists(cache.shard_path(self._out, i, self._shards)):
            cache.write_shard(self._out, i, self._shards, list(captions), self._encoder, batch=self._text.batch)
        yield i
