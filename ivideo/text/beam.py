"""Text caches for very large sets of captions, made with Apache Beam: on this machine, Dataflow, Flink or Spark.

The format is that of `ivideo.text.cache`; the caller sets the number of shards. One worker makes each shard, and each
process of a worker loads the encoder once. All workers must see the captions, the encoder and the cache: in a bucket
(gs://…) or in a shared folder. A file pattern names the captions.
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
    """Makes a cache of all lines in the files that match `pattern`, and of the config's sample prompts.

    `options` are Beam's, such as --runner=DataflowRunner; without options it runs on this machine. Existing shards are
    kept, so that the same call resumes after an interruption. UserError, before anything is written, where Beam
    rejects the options, no file matches, the encoder cannot be read, or `out` holds another cache. Captions that are
    not UTF-8, and existing shards of other captions, are Beam's own errors, with the reason in the message.
    """
    try:
        pipeline = beam.Pipeline(options=PipelineOptions(options))
        matched = FileSystems.match([pattern])[0].metadata_list
    except (ValueError, OSError, BeamIOError) as e:
        raise UserError(
            f"Beam rejects --beam={' --beam='.join(options)} or --captions={pattern} ({e}): correct them"
        ) from e
    if not matched:
        raise UserError(f"--captions={pattern} matches no file: give a pattern of text files, quoted for the shell")
    cache.begin(out, config.text, fingerprint(config.text), shards=shards, of=pattern)
    with pipeline:
        lines = pipeline | "captions" >> beam.io.ReadFromText(pattern)
        prompts = pipeline | "sample prompts" >> beam.Create(cache.sample_prompts(config))
        # With few captions some shards are empty; they have to be written too
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
    """Writes the shard of an element (number, captions), leaving out empty captions."""

    def __init__(self, config: str, out: str, shards: int):
        self._config, self._out, self._shards = config, out, shards
        self._shared = Shared()  # holds the encoder for all threads of a process

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
