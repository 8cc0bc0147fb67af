"""The demo: prose and code of the interpreter's own standard library, half and half.

Tasks demo_prose_* and demo_code_*; mixtures demo_ul2 and demo_full_lm. The data lies in
tasks.locations.data_dir(), built by `python -m scripts.prepare_demo`.

Rates count training examples, not tokens or documents, as in every published mixture: seqio mixes
after denoising. With one objective and one length on both sides they are shares of tokens too.
"""

from __future__ import annotations

import functools
import os

import seqio

from openmoe.config import ConfigError
from openmoe.data.sources import TextFiles
from openmoe.data.vocabulary import Vocabulary
from tasks import chains, demo_corpus, locations


def _file(name: str) -> str:
  """A file of the demo data.

  Raises:
    ConfigError: if the demo data is not there.
  """
  directory = locations.data_dir()
  if not demo_corpus.is_complete(directory):
    raise ConfigError(
      f'There is no demo data in {directory}: run `python -m scripts.prepare_demo`, or set '
      'OPENMOE_DATA_DIR to where it is.'
    )
  return os.path.join(directory, name)


def _patterns(corpus: str) -> dict[str, str]:
  return {
    'train': _file(f'{corpus}-train-*.jsonl'),
    'validation': _file(f'{corpus}-validation.jsonl'),
  }


def _vocabulary_path() -> str:
  return _file('vocabulary.model')


VOCABULARY = Vocabulary(_vocabulary_path, demo_corpus.EXTRA_IDS)

for _corpus in demo_corpus.CORPORA:
  chains.add_corpus(
    f'demo_{_corpus}',
    TextFiles(functools.partial(_patterns, _corpus), splits=('train', 'validation')),
    VOCABULARY,
  )

for _objective in chains.OBJECTIVES:
  for _suffix in ('', '_reference'):
    seqio.MixtureRegistry.add(
      f'demo_{_objective}{_suffix}',
      [(f'demo_{corpus}_{_objective}{_suffix}', 0.5) for corpus in demo_corpus.CORPORA],
    )
