"""The text of a continuation: what stands behind a prompt, what ends it, what is certain of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Last tokens of a prompt that its continuation is decoded with; one would do for its spaces, and
# the character that a prompt ends with may have some bytes.
CONTEXT_TOKENS = 8


class Continuation:
  """Reads the tokens behind one prompt as text.

  Args:
    vocabulary: see openmoe.inference.model.TextVocabulary.
    prompt: token ids, without the one that begins a sequence.
    stop: texts of which the first one ends the continuation.
  """

  def __init__(self, vocabulary: Any, prompt: Sequence[int], stop: Sequence[str] = ()):
    self._vocabulary, self._before = vocabulary, list(prompt[-CONTEXT_TOKENS:])
    self._stop = tuple(stop)
    self._known = 0  # tokens that hold no stop string

  def text(self, ids: Sequence[int]) -> str:
    """What the text has behind its prompt.

    Tokens alone do not say it: SentencePiece drops the space of the first piece that it decodes,
    so the last tokens of the prompt are decoded with them.
    """
    decode = self._vocabulary.decode
    if not self._before:
      return decode(ids)
    prompt, whole = decode(self._before).rstrip('\ufffd'), decode([*self._before, *ids])
    return whole[len(prompt) :] if whole.startswith(prompt) else decode(ids)

  def end(self, ids: Sequence[int]) -> tuple[str, int] | None:
    """(text before a stop string, tokens up to the one that completed it); None without one.

    Args:
      ids: all tokens so far; they begin with those of earlier calls.
    """
    if self._stop and any(s in self.text(ids) for s in self._stop):
      for count in range(self._known + 1, len(ids) + 1):
        text = self.text(ids[:count])
        places = [text.find(s) for s in self._stop if s in text]
        if places:
          return text[: min(places)], count
    self._known = len(ids)
    return None

  def certain(self, ids: Sequence[int]) -> str:
    """The text that later tokens will not change, while there is no end."""
    ids = list(ids)
    # A run of byte tokens may still change as a whole, and letters of a stop string may be on their
    # way.
    is_byte = getattr(self._vocabulary, 'is_byte', lambda token: False)
    while ids and is_byte(ids[-1]):
      ids.pop()
    text = self.text(ids)
    ends = (n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n]))
    held = max(ends, default=0)
    return text[: len(text) - held].rstrip('\ufffd')
