"""Text caches of very large sets of captions, by Apache Beam: on this machine, or on Dataflow, Flink or Spark.

The cache is that of `ivideo.text.cache`, with as many shards as are asked for; each is made by one worker, whose
processes load the encoder once. Captions, encoder and cache lie where all workers see them: in a bucket (gs://…), or in
a folder that they share. A file pattern stands for the captions.
"""

import json

import ml_collections

from ivideo import files
from ivideo.errors import UserError
from ivideo.prompts import one_line
from ivideo.text import cache, fingerprint, load_encoder

try:
    import apache_beam as beam
    from apache_beam.io.filesystem import BeamIOError
    from apache_beam.io.filesystems import FileSystems
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.utils.shared import Shared
except ImportError as e:
    raise UserError("Apache Beam is not installed: run `pip install '.[beam]'` in the clone") from e


def encode_captions(config, pattern: str, out: str, *, shards: int, options: list[str]) -> None:
    """Makes the cache of all lines of the files that match, and of the config's sample prompts.

    `options` are Beam's, such as --runner=DataflowRunner; none runs it here. Shards that are there already are left as
    they are, so the same call again goes on where it was stopped. UserError, before anything is written, where Beam
    does not take the options, no file matches, the encoder cannot be read, or `out` is of others. Beam's own errors for
    captions that are not UTF-8; and for a shard that is there and of other captions, which its message says.
    """
    try:
        pipeline = beam.Pipeline(options=PipelineOptions(options))
        matched = FileSystems.match([pattern])[0].metadata_list
    except (ValueError, OSError, BeamIOError) as e:
        raise UserError(f"Beam does not take --beam={' --beam='.join(options)} or --captions={pattern}: {e}") from e
    if not matched:
        raise UserError(f"--captions={pattern} matches no file: give a pattern of text files, quoted for the shell")
    cache.begin(out, config.text, fingerprint(config.text), shards=shards, of=pattern)
    with pipeline:
        lines = pipeline | "captions" >> beam.io.ReadFromText(pattern)
        prompts = pipeline | "sample prompts" >> beam.Create(cache.sample_prompts(config))
        # Few captions leave shards empty, which have to be there too
        all_shards = pipeline | "shards" >> beam.Create([(i, "") for i in range(shards)])
        dealt = (
            (lines, prompts)
            | "one set" >> beam.Flatten()
            | beam.Map(one_line)
            | beam.Filter(bool)
            | beam.Distinct()
            | "deal" >> beam.Map(lambda caption: (cache.shard_of(cache.key_of(caption), shards), caption))
        )
        _ = (
            (dealt, all_shards)
            | "with empty shards" >> beam.Flatten()
            | beam.GroupByKey()
            | beam.ParDo(_Encode(config.to_json(), out, shards))
        )
    count, size = cache.finish(out)
    print(cache.summary(out, count, size))


class _Encode(beam.DoFn):
    """Writes shards: (number, captions), of which empty ones do not count."""

    def __init__(self, config: str, out: str, shards: int):
        self._config, self._out, self._shards = config, out, shards
        self._shared = Shared()  # the encoder, by all threads of a process

    def setup(self):
        self._text = ml_collections.ConfigDict(json.loads(self._config)).text
        self._encoder = self._shared.acquire(self._load)

    def _load(self):
        encoder = load_encoder(self._text)
        cache.check_encoder(self._out, encoder.fingerprint)
        return encoder

    def process(self, element):
        i, captions = element[0], [caption for caption in element[1] if caption]
        if files.exists(cache.shard_path(self._out, i, self._shards)):
            cache.check_shard(self._out, i, self._shards, captions)
        else:
            cache.write_shard(self._out, i, self._shards, captions, self._encoder, batch=self._text.batch)
        yield i
