"""The private names of seqio that are used here, and why; each fails by name when seqio moves it.

tests/data/test_seqio_private.py says what to do then.
"""

from __future__ import annotations

import seqio


def cached_source(task: seqio.Task, split: str) -> seqio.DataSource:
  """The files of a cached task. The public way to them builds the whole dataset."""
  return task._get_cached_source(split)


class LazySentencePieceVocabulary(seqio.SentencePieceVocabulary):
  """Loads through load_model(), which may find the file and check it first.

  seqio reads the model in _model_context(), the one place before every use of it.
  """

  def load_model(self) -> str:
    """Path of the model file, called before the first use; what it raises is raised there."""
    raise NotImplementedError

  def check_model(self, pieces) -> None:
    """Refuses a model that was read, by raising."""

  def _model_context(self):
    if not self._model:
      self._sentencepiece_model_file = self.load_model()
      super()._model_context()
      self.check_model(self._model.tokenizer)
    return self._model
