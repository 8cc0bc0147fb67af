"""What is asked of a server, and what it tells while it answers; tokens and text, no HTTP."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

from openmoe.inference.continuation import Continuation
from openmoe.inference.decode import Sampling


class Overloaded(RuntimeError):
  """There is no room in the queue.

  Attributes:
    retry_after: seconds after which there may be some.
  """

  def __init__(self, message: str, retry_after: int):
    super().__init__(message)
    self.retry_after = retry_after


@dataclasses.dataclass(frozen=True)
class Token:
  """One token of an answer, or of the prompt where that was asked for.

  Attributes:
    id: of the vocabulary.
    log_prob: natural logarithm, whatever the temperature; None of a prompt's first token.
    others: the likeliest (token, logarithm) of that place, as many as were asked for.
    experts: of every router, in their order in the model, what the place that chose the token went
      through; () of a prompt's tokens.
  """

  id: int
  log_prob: float | None
  others: tuple[tuple[int, float], ...] = ()
  experts: tuple[tuple[int, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Event:
  """A piece of an answer.

  Attributes:
    text: that is certain from now on.
    tokens: that came with it.
    finish: 'eos', 'stop', 'length', 'time' or 'error'; None while more will come.
    error: what went wrong.
    prompt: of the first event, where the prompt's own tokens were asked for.
  """

  text: str = ''
  tokens: tuple[Token, ...] = ()
  finish: str | None = None
  error: str | None = None
  prompt: tuple[Token, ...] = ()


@dataclasses.dataclass(frozen=True)
class Ask:
  """One sequence to continue.

  Attributes:
    prompt: token ids without the one that begins a sequence.
    max_new_tokens: at most so many; 0 reads the prompt alone.
    stop: texts that end it.
    sampling: how tokens are drawn.
    seed: uint32, of this sequence.
    alternatives: how many of the likeliest tokens are told of every place.
    score_prompt: whether to tell how probable the prompt's tokens are.
    deadline: of time.monotonic(), after which the answer ends.
  """

  prompt: tuple[int, ...]
  max_new_tokens: int
  stop: tuple[str, ...] = ()
  sampling: Sampling = Sampling()
  seed: int = 0
  alternatives: int = 0
  score_prompt: bool = False
  deadline: float = float('inf')


class Work:
  """An Ask on its way through the engine. Everything but `cancel` belongs to the engine's thread.

  Args:
    ask: what is wanted.
    tell: called with every Event, in the engine's thread; it must not wait.
    vocabulary: of text.
    start_id: token that begins a sequence.
  """

  def __init__(self, ask: Ask, tell: Callable[[Event], None], vocabulary: Any, start_id: int):
    self.ask, self._tell = ask, tell
    self.row = [start_id, *ask.prompt]  # all tokens of the sequence, new ones too
    self.prompt_length = len(self.row)
    self.read = 0  # tokens of `row` that are in the cache
    self.slot: int | None = None
    self.prompt_tokens: list[Token] = []
    self.born, self.first_token = time.monotonic(), None
    self.finish: str | None = None
    self._text = Continuation(vocabulary, ask.prompt, ask.stop)
    self._shown = ''
    self._waiting: list[Token] = []  # told with the next piece of text
    self._cancelled = threading.Event()

  @property
  def new(self) -> list[int]:
    """Tokens of the answer."""
    return self.row[self.prompt_length :]

  @property
  def cancelled(self) -> bool:
    return self._cancelled.is_set()

  def cancel(self) -> None:
    """Asks the engine to forget this; from any thread."""
    self._cancelled.set()

  def add(self, token: Token, eos_ids: tuple[int, ...], room: int) -> None:
    """Takes the next token, and tells what is certain now.

    Args:
      room: new tokens that the sequence may have in all.
    """
    if self.first_token is None:
      self.first_token = time.monotonic()
    if token.id in eos_ids:
      return self.close('eos')
    self.row.append(token.id)
    self._waiting.append(token)
    new = self.new
    if (end := self._text.end(new)) is not None:
      return self.close('stop', end[0])
    if len(new) >= room:
      return self.close('length')
    text = self._text.certain(new)
    if text.startswith(self._shown) and len(text) > len(self._shown):
      self._say(text)
    return None

  def close(self, finish: str, text: str | None = None, error: str | None = None) -> None:
    """Tells the rest.

    Args:
      text: of the whole answer; None for that of its tokens.
    """
    self.finish = finish
    self._say(self._text.text(self.new) if text is None else text, finish, error)

  def _say(self, text: str, finish: str | None = None, error: str | None = None) -> None:
    same = _common(text, self._shown)
    prompt, self.prompt_tokens = tuple(self.prompt_tokens), []
    event = Event(text[same:], tuple(self._waiting), finish, error, prompt)
    self._shown, self._waiting = text, []
    self._tell(event)


def _common(a: str, b: str) -> int:
  """How many characters two texts begin with together."""
  differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
  return next(differ, min(len(a), len(b)))
