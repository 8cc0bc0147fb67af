"""A record's documents and what stands in its header, from an opened model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from openmoe.atlas.record import Document
from openmoe.config import ConfigError
from openmoe.inference.model import LanguageModel


def encoded(model: LanguageModel, texts: Iterable[Any]) -> Iterator[Document]:
  """Documents as the model reads them.

  Args:
    texts: with name, labels, and a content that is a text, messages or token ids.

  Raises:
    ConfigError: a token is beyond the model's vocabulary.
  """
  for text in texts:
    content = text.content
    if isinstance(content, str):
      tokens = list(model.vocabulary.encode(content))
    elif content and isinstance(content[0], dict):
      tokens = model.encode_chat(content, answer_follows=False)
    else:
      tokens = list(content)
    wrong = [token for token in tokens if not 0 <= token < model.config.vocab_size]
    if wrong:
      raise ConfigError(
        f'{text.name} has the token {wrong[0]}; {model.name} has '
        f'vocab_size={model.config.vocab_size}. Take the vocabulary of this model.'
      )
    yield Document(text.name, tokens, text.labels)
