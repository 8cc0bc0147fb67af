"""One batch of prompts on its way: tokens from the devices, texts and their ends on the host."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from openmoe.config import ConfigError
from openmoe.inference.continuation import Continuation
from openmoe.inference.decode import Sampling, State, bucket, extend, start

CHECK_EVERY = 16  # new tokens between two looks at the text for stop strings
SHOW_EVERY = 2  # and between two pieces of text that are shown as they come


@dataclasses.dataclass(frozen=True)
class Generation:
  """One continuation.

  Attributes:
    text: ends before the stop string or EOS.
    tokens: up to the one that completed the stop string, without EOS.
    log_probs: of these tokens, natural logarithms, whatever the temperature.
    finish: 'eos', 'stop' or 'length'.
  """

  text: str
  tokens: tuple[int, ...]
  log_probs: tuple[float, ...]
  finish: str


@jax.jit
def _keys(seed_b):
  return jax.vmap(jax.random.key)(seed_b)


class Rows:
  """One batch of prompts that is being continued.

  Args:
    prompts: token ids, without the token that begins a sequence.
    seeds_PS: uint32 [prompts, samples] of the draws.
    model: a LanguageModel.
  """

  def __init__(self, prompts, seeds_PS: np.ndarray, model: Any):
    self._model, self._prompts = model, len(prompts)
    self._tokens, self._lengths = model._padded([[model.start_id, *p] for p in prompts])
    self._samples = seeds_PS.shape[1]
    self._texts: list[Continuation] = []
    self._own_prompts = prompts
    self._limits = np.zeros(0, np.int64)  # most new tokens of each row
    padded = np.zeros((len(self._tokens), self._samples), np.uint32)
    padded[: len(prompts)] = seeds_PS
    self._seeds = padded.reshape(-1)
    self._ends: dict[int, tuple[str, int]] = {}  # row -> (text, tokens) where it was stopped

  def run(self, max_new: int, stop, sampling: Sampling, show) -> list[list[Generation]]:
    """Continues all rows to their ends."""
    model = self._model
    # Every row has the room that its own prompt leaves, whoever is beside it.
    room_p = model.max_length - self._lengths[: self._prompts]
    self._limits = np.repeat(np.minimum(max_new, room_p), self._samples)
    vocabulary = model.vocabulary
    self._texts = [
      Continuation(vocabulary, self._own_prompts[i // self._samples], stop)
      for i in range(len(self._limits))
    ]
    most = int(self._limits.max())
    width = bucket(most, least=8)
    every = SHOW_EVERY if show else CHECK_EVERY if stop else max_new
    values = (np.float32(max(sampling.temperature, 1e-6)), np.float32(sampling.top_p))
    fixed = {
      'config': model.config,
      'program': sampling.program,
      'eos_ids': model.eos_ids,
    }
    real = np.repeat(self._lengths > 0, self._samples)
    shown = ''
    with model.on_mesh():
      limit = min(every, most)
      state = start(
        model.params,
        self._tokens,
        self._lengths,
        _keys(self._seeds),
        ~real,
        np.int32(limit),
        *values,
        samples=self._samples,
        max_new=width,
        **fixed,
      )
      while True:
        done = np.asarray(state.done_b).copy()
        done[: len(self._limits)] |= int(state.step) >= self._limits
        if stop:
          self._look_for_ends(state, done)
        if show:
          shown = self._show(state, done, shown, show)
        if done.all() or int(state.step) >= most:
          break
        limit = min(limit + every, most)
        state = state.replace(done_b=jnp.asarray(done))
        state = extend(model.params, state, np.int32(limit), *values, **fixed)
    model._note_drops(state.drops)
    tokens, log_probs = np.asarray(state.tokens_bW), np.asarray(state.log_probs_bW)
    one = lambda row: self._result(row, tokens[row], log_probs[row], int(state.step))
    rows = range(self._prompts * self._samples)
    found = [one(row) for row in rows]
    return [found[i : i + self._samples] for i in range(0, len(found), self._samples)]

  def _own(self, row: int, tokens_W: np.ndarray, step: int) -> tuple[list[int], bool]:
    """A row's tokens before EOS and inside its room, and whether EOS came."""
    ids = tokens_W[: min(step, self._limits[row])].tolist()
    end = next((i for i, token in enumerate(ids) if token in self._model.eos_ids), None)
    return (ids, False) if end is None else (ids[:end], True)

  def _look_for_ends(self, state: State, done: np.ndarray) -> None:
    """Ends rows whose text holds a stop string, at the token that completed it."""
    tokens = np.asarray(state.tokens_bW)
    for row, text in enumerate(self._texts):
      if row not in self._ends:
        ids, _ = self._own(row, tokens[row], int(state.step))
        if (end := text.end(ids)) is not None:
          self._ends[row] = end
          done[row] = True

  def _show(self, state: State, done, shown: str, show) -> str:
    """Passes on what is certain of the text, returns all that was passed on."""
    ids, _ = self._own(0, np.asarray(state.tokens_bW)[0], int(state.step))
    if done[0]:
      text = self._ends[0][0] if 0 in self._ends else self._texts[0].text(ids)
    else:
      text = self._texts[0].certain(ids)
      if not text.startswith(shown):
        return shown  # a later token will settle it
    same = next((i for i, (a, b) in enumerate(zip(text, shown, strict=False)) if a != b), None)
    same = min(len(text), len(shown)) if same is None else same
    if new := text[same:]:
      show(new)
    return text

  def _result(self, row: int, tokens_W, log_probs_W, step: int) -> Generation:
    ids, ended = self._own(row, tokens_W, step)
    finish = 'eos' if ended else 'length'
    if row in self._ends:
      text, count = self._ends[row]
      ids, finish = ids[:count], 'stop'
    else:
      text = self._texts[row].text(ids)
    if not np.isfinite(log_probs_W[: len(ids)]).all():
      raise ConfigError(
        f'{self._model.name} gives logits that are not finite: its weights are not those of a '
        'model that works. `python -m convert fsck` says which tensors are damaged.'
      )
    return Generation(text, tuple(ids), tuple(log_probs_W[: len(ids)].tolist()), finish)
