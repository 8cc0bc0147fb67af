"""Pretraining tasks over a user's own .txt, .jsonl, .csv and .parquet files, bound from gin.

  --gin_file=gin/mixtures/text_files.gin --gin.TEXT_FILES="'/path/*.jsonl'"

registers text_files_ul2, text_files_ul2_noprefix and text_files_full_lm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import seqio

from openmoe.config import ConfigError
from openmoe.data.sources import BadRecord, TextFiles
from openmoe.data.vocabulary import Vocabulary
from tasks import chains, demo, demo_corpus

_registered: dict[str, UserFiles] = {}


@dataclasses.dataclass(frozen=True)
class UserFiles:
  """One corpus of the user's own.

  Attributes:
    files: glob pattern or patterns; .txt, .jsonl, .csv (each also .gz, .zst), .parquet.
    name: of the corpus; its tasks are <name>_ul2, <name>_ul2_noprefix, <name>_full_lm.
    vocabulary: SentencePiece model; None takes the demo's.
    extra_ids: sentinels to add to that model.
    text_field: key of the text in .jsonl objects, column of .csv and .parquet.
    held_out_every: every so many-th document is the validation split; 0 for none.
    bad_record: 'skip' counts records without text, 'refuse' stops at the first.
  """

  files: str | Sequence[str]
  name: str = 'text_files'
  vocabulary: str | None = None
  extra_ids: int = demo_corpus.EXTRA_IDS
  text_field: str = 'text'
  held_out_every: int = 50
  bad_record: BadRecord | str = BadRecord.SKIP

  def register(self) -> list[str]:
    """Registers the tasks and returns their names; again with the same values is a no-op.

    Raises:
      ConfigError: if the name is taken by something else.
    """
    if _registered.get(self.name) == self:
      return [n for n in seqio.TaskRegistry.names() if n.startswith(f'{self.name}_')]
    if f'{self.name}_ul2' in seqio.TaskRegistry.names():
      raise ConfigError(f'Tasks named {self.name}_* exist already; give UserFiles another name.')
    source = TextFiles(
      {'train': self.files},
      text_field=self.text_field,
      held_out_every=self.held_out_every,
      bad_record=self.bad_record,
    )
    vocabulary = demo.VOCABULARY
    if self.vocabulary is not None:
      vocabulary = Vocabulary(self.vocabulary, self.extra_ids)
    names = chains.add_corpus(self.name, source, vocabulary)
    _registered[self.name] = self
    return names
