"""Builders of the pretraining corpora: the seven RedPajama subsets and The Stack.

The raw files lie in the layout their publishers use, below `manual_dir`. Features are text and
meta (JSON), one split `train`. Source of names, layout and counts: the authors' build scripts,
whose unsorted inputs and non-JSON metadata are not kept.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping

import tensorflow_datasets as tfds

from openmoe.config import ConfigError
from tasks import records

# Languages of The Stack to build, comma separated folder names; empty builds all.
LANGUAGES_VARIABLE = 'OPENMOE_STACK_LANGUAGES'

REDPAJAMA = (
  'arxiv', 'book', 'c4', 'common_crawl', 'github', 'stackexchange', 'wikipedia',
)  # fmt: skip


def text_and_meta(where: str, record: Mapping, text_field: str = 'text') -> dict[str, str]:
  """{'text', 'meta'}: meta is JSON of the field `meta`, or of all fields but the text.

  Raises:
    ConfigError: if the text is not a string.
  """
  text = record.get(text_field)
  if not isinstance(text, str):
    raise ConfigError(f'{where}: field {text_field!r} holds no text but {text!r}.')
  rest = {k: v for k, v in record.items() if k != text_field}
  return {'text': text, 'meta': to_json(rest.get('meta', rest))}


def to_json(value: object) -> str:
  """JSON with sorted keys; dates as ISO text, bytes as base64."""

  def other(item):
    if isinstance(item, bytes):
      return base64.b64encode(item).decode()
    return item.isoformat() if hasattr(item, 'isoformat') else str(item)

  return json.dumps(value, sort_keys=True, ensure_ascii=False, default=other)


class _Corpus(tfds.core.GeneratorBasedBuilder):
  """text and meta of every record below manual_dir."""

  VERSION = tfds.core.Version('1.0.0')
  MANUAL_DOWNLOAD_INSTRUCTIONS = 'See scripts/build_datasets.sh.'
  # TFDS would look for a README and checksums beside the code, with a module it does not require.
  code_path = None

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      features=tfds.features.FeaturesDict(
        {'text': tfds.features.Text(), 'meta': tfds.features.Text()}
      ),
    )

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(str(dl_manager.manual_dir))}

  def _generate_examples(self, folder: str):
    for key, record in records.jsonl_records(folder):
      yield key, text_and_meta(f'{folder}/{key}', record)


class RedpajamaArxiv(_Corpus):
  """RedPajama arXiv: arxiv/arxiv_<uuid>.jsonl, 100 files."""

  name = 'redpajama_arxiv'


class RedpajamaBook(_Corpus):
  """RedPajama books: book/book.jsonl. No longer published; for those who have a copy."""

  name = 'redpajama_book'


class RedpajamaC4(_Corpus):
  """RedPajama C4: c4/c4-train.NNNNN-of-01024.jsonl, 1024 files."""

  name = 'redpajama_c4'


class RedpajamaCommonCrawl(_Corpus):
  """RedPajama Common Crawl: common_crawl/<dump>/*.jsonl.zst or .jsonl, 859 files in 5 dumps."""

  name = 'redpajama_common_crawl'


class RedpajamaGithub(_Corpus):
  """RedPajama GitHub: github/filtered_<hash>.sampled.jsonl, 98 files."""

  name = 'redpajama_github'


class RedpajamaStackexchange(_Corpus):
  """RedPajama StackExchange: stackexchange/stackexchange.jsonl."""

  name = 'redpajama_stackexchange'


class RedpajamaWikipedia(_Corpus):
  """RedPajama Wikipedia: wikipedia/wiki.jsonl."""

  name = 'redpajama_wikipedia'


class TheStackDedup(_Corpus):
  """The Stack, deduplicated: data/<language>/*.parquet, languages selectable."""

  name = 'the_stack_dedup'

  def _generate_examples(self, folder: str):
    names = [n for n in os.environ.get(LANGUAGES_VARIABLE, '').split(',') if n]
    # A clone of the data set has data/<language>; a folder of languages does as well.
    root = os.path.join(folder, 'data')
    root = root if os.path.isdir(root) else folder
    missing = [n for n in names if not os.path.isdir(os.path.join(root, n))]
    if missing:
      raise ConfigError(
        f'{LANGUAGES_VARIABLE} names {missing}, which are no folders of {root}; there are '
        f'{sorted(os.listdir(root))[:20]}.'
      )
    keep = (lambda path: path.parts[0] in names) if names else bool
    for key, row in records.parquet_records(root, keep=keep):
      yield key, text_and_meta(f'{root}/{key}', row, 'content')


BUILDERS = {
  builder.name: builder
  for builder in (
    RedpajamaArxiv, RedpajamaBook, RedpajamaC4, RedpajamaCommonCrawl, RedpajamaGithub,
    RedpajamaStackexchange, RedpajamaWikipedia, TheStackDedup,
  )
}  # fmt: skip
