"""The engine: one thread that reads prompts and continues slots, a queue before it.

Every turn it lets go of who left, puts waiting sequences into free slots, reads one chunk of the
sequence that waits longest, and continues all others by a token; so a long prompt never holds up
the answers under way. A slot keeps what it held after its sequence has ended: a prompt that begins
with the same chunks takes them from there and reads only the rest.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable

import jax
import numpy as np

from openmoe import partitioning
from openmoe.config import ConfigError, Dispatch
from openmoe.inference.model import LanguageModel
from openmoe.serving import slots
from openmoe.serving.device import Device, draw_arrays
from openmoe.serving.request import Ask, Event, Overloaded, Token, Work

_IDLE_SECONDS = 0.5  # between two looks for who left, while nothing is under way


@dataclasses.dataclass
class Counts:
  """What a server has done, for /metrics.

  Attributes:
    asked, finished, refused, cancelled, failed: sequences.
    prompt_tokens, reused_tokens, new_tokens: tokens; reused ones were in a slot already.
    steps, chunks: calls of the device.
    step_rows: active rows, summed over the steps.
    first_token_seconds: from asking to the first token, summed over sequences.
  """

  asked: int = 0
  finished: int = 0
  refused: int = 0
  cancelled: int = 0
  failed: int = 0
  prompt_tokens: int = 0
  reused_tokens: int = 0
  new_tokens: int = 0
  steps: int = 0
  chunks: int = 0
  step_rows: int = 0
  first_token_seconds: float = 0.0


def partitioning_of_rows(mesh: jax.sharding.Mesh) -> int:
  """Parts that a batch is split into."""
  return mesh.shape[partitioning.DATA] * mesh.shape[partitioning.EXPERT]


class Engine:
  """Continues sequences for whoever asks.

  Args:
    model: dropless, in any form that LanguageModel holds.
    slots: sequences at a time.
    max_queue: sequences that may wait.

  Raises:
    ConfigError: a number is less than 1, the model drops tokens, or its mesh splits batches.
  """

  def __init__(self, model: LanguageModel, slots_count: int = 16, max_queue: int = 64):
    if slots_count < 1 or max_queue < 1:
      raise ConfigError(f'slots={slots_count} and max_queue={max_queue} must be at least 1.')
    if model.config.moe is not None and model.config.moe.dispatch is not Dispatch.DROPLESS:
      raise ConfigError(
        f'{model.name} routes with capacity, by which answers depend on their neighbours; serve '
        'it without.'
      )
    if model.mesh is not None and partitioning_of_rows(model.mesh) > 1:
      raise ConfigError(
        f'{model.name} lies on a mesh of {dict(model.mesh.shape)}, and a server splits weights '
        'alone: choose num_model_partitions=ALL DEVICES, or show it fewer devices.'
      )
    self.model, self.slots, self.max_queue = model, slots_count, max_queue
    self.counts = Counts()
    self.broken: str | None = None
    self._queue: collections.deque[Work] = collections.deque()
    self._at: list[Work | None] = [None] * slots_count
    self._held: list[list[int]] = [[] for _ in range(slots_count)]  # tokens that a slot's cache has
    self._used = [0.0] * slots_count  # when a slot was last let go
    self._device = Device(model, slots_count)
    self._lock = threading.Condition()
    self._stopping = False
    self._thread: threading.Thread | None = None

  # --- from any thread

  def start(self) -> None:
    """Reserves the cache and begins."""
    with self.model.on_mesh():
      self._device.reserve()
    self._thread = threading.Thread(target=self._run, name='engine', daemon=True)
    self._thread.start()

  def warm(self) -> None:
    """Compiles what short prompts need, so that nobody waits for it.

    Raises:
      ConfigError: the model cannot answer.
    """
    for chunk in slots.CHUNKS:
      length = min(chunk, self.model.max_length - 4) - 1
      if length < 0:
        continue
      ended, told = threading.Event(), []
      tell = lambda event, ended=ended, told=told: (
        told.append(event.error), event.finish and ended.set()
      )  # fmt: skip
      token = self.model.start_id
      self.submit([Ask((token,) * length, 2)], [tell])
      ended.wait()
      if told[-1]:
        raise ConfigError(told[-1])
    with self._lock:
      self.counts = Counts()

  def stop(self) -> None:
    """Ends what is under way with an error, and the thread."""
    with self._lock:
      self._stopping = True
      self._lock.notify()
    if self._thread is not None:
      self._thread.join()

  def submit(self, asks: list[Ask], tell: list[Callable[[Event], None]]) -> list[Work]:
    """Queues sequences, all of them or none.

    Raises:
      Overloaded: the queue has no room for them.
      ConfigError: one cannot be continued.
    """
    for ask in asks:
      self.check(ask)
    made = [
      Work(ask, one, self.model.vocabulary, self.model.start_id)
      for ask, one in zip(asks, tell, strict=True)
    ]
    with self._lock:
      if self._stopping or self.broken:
        raise Overloaded(f'The server is ending: {self.broken or "it was told to"}.', 30)
      waiting = len(self._queue)
      free = sum(work is None for work in self._at)
      if waiting + len(made) > self.max_queue + free:
        self.counts.refused += len(made)
        raise Overloaded(
          f'{waiting} sequences wait already, and at most {self.max_queue} may.',
          1 + waiting // self.slots,
        )
      self.counts.asked += len(made)
      self._queue.extend(made)
      self._lock.notify()
    return made

  def check(self, ask: Ask) -> None:
    """Raises ConfigError where a sequence cannot be continued."""
    model = self.model
    model.check_ids('The prompt', ask.prompt)
    most = model.max_length - 1 - (1 if ask.max_new_tokens else 0)
    if len(ask.prompt) > most:
      raise ConfigError(
        f'The prompt has {len(ask.prompt)} tokens, and {model.name} takes at most {most} of '
        f'max_length={model.max_length}; shorten it.'
      )

  def load(self) -> dict[str, int]:
    """How many sequences wait, are read, and are continued."""
    with self._lock:
      busy = [work for work in self._at if work is not None]
      reading = sum(work.read < work.prompt_length for work in busy)
      return {'waiting': len(self._queue), 'reading': reading, 'answering': len(busy) - reading}

  # --- the engine's thread

  def _run(self) -> None:
    try:
      with self.model.on_mesh():
        while self._turn():
          pass
        self._device.end()
    # Whatever the device raises: nobody may wait for ever for an answer.
    except Exception as error:
      self.broken = f'{type(error).__name__}: {error}'
      raise
    finally:
      self._forget_all(self.broken or 'The server is ending.')

  def _forget_all(self, why: str) -> None:
    with self._lock:
      self._stopping = True
      left = [work for work in self._at if work is not None] + list(self._queue)
      self._queue.clear()
      self._at = [None] * self.slots
    for work in left:
      work.close('error', error=why)

  def _turn(self) -> bool:
    """One turn; whether there is to be another."""
    idle = False
    with self._lock:
      if self._stopping:
        return False
      self._let_go()
      self._seat()
      if all(work is None for work in self._at):
        self._lock.wait(_IDLE_SECONDS)
        idle = True
    if idle:
      self._device.idle()
      return True
    reading = [w for w in self._at if w is not None and w.read < w.prompt_length]
    if reading:
      self._read(min(reading, key=lambda work: work.born))
    if answering := [w for w in self._at if w is not None and w.read >= w.prompt_length]:
      self._step([w for w in answering if w.finish is None])
    return True

  def _let_go(self) -> None:
    """Frees the slots of sequences that have ended, and forgets those that nobody wants."""
    now = time.monotonic()
    for work in [*self._at, *self._queue]:
      if work is None or work.finish is not None:
        continue
      if work.cancelled:
        work.finish = 'cancelled'
        self.counts.cancelled += 1
      elif now > work.ask.deadline:
        work.close('time', error=None if work.new else 'The time for an answer is over.')
    for slot, work in enumerate(self._at):
      if work is not None and work.finish is not None:
        # New tokens came one by one, and may differ in their last bits from such that are read.
        self._held[slot] = work.row[: min(work.read, work.prompt_length)]
        self._used[slot] = now
        self._at[slot] = None
        self._count(work)
    self._queue = collections.deque(work for work in self._queue if work.finish is None)

  def _count(self, work: Work) -> None:
    if work.finish != 'cancelled':
      self.counts.finished += work.finish != 'error'
      self.counts.failed += work.finish == 'error'
    self.counts.new_tokens += len(work.new)
    if work.first_token is not None:
      self.counts.first_token_seconds += work.first_token - work.born

  def _seat(self) -> None:
    """Gives free slots to who waits longest."""
    while self._queue and (free := [i for i, work in enumerate(self._at) if work is None]):
      work = self._queue.popleft()
      source, length = self._shared(work)
      # Its own slot if it is free; else the one that was let go first.
      slot = source if source in free else min(free, key=lambda i: self._used[i])
      if length and slot != source:
        self._device.copy(source, slot)
      work.slot, work.read = slot, length
      self._at[slot], self._held[slot] = work, []
      self.counts.prompt_tokens += work.prompt_length
      self.counts.reused_tokens += length

  def _shared(self, work: Work) -> tuple[int, int]:
    """(slot, tokens) of the most whole chunks that a slot has of a prompt.

    Whole chunks, because only these are read the same whatever comes behind them; and never the
    whole prompt, as somebody has to say what follows it.
    """
    if work.ask.score_prompt:
      return 0, 0
    best, chunk = (0, 0), max(slots.CHUNKS)
    most = (work.prompt_length - 1) // chunk * chunk
    for slot, held in enumerate(self._held):
      there = self._at[slot]
      have = held if there is None else there.row[: min(there.read, there.prompt_length)]
      length = 0
      while length < min(most, len(have)) and (
        have[length : length + chunk] == work.row[length : length + chunk]
      ):
        length += chunk
      length = min(length, most)
      if length > best[1]:
        best = slot, length
    return best

  def _read(self, work: Work) -> None:
    """Reads the next chunk of a prompt, and draws the first token behind the last one."""
    count, size = slots.chunks_of(work.prompt_length - work.read)[0]
    ask, first = work.ask, work.read
    tokens, following = np.zeros(size, np.int32), np.zeros(size, np.int32)
    tokens[:count] = work.row[first : first + count]
    known = work.row[first + 1 : first + count + 1]
    following[: len(known)] = known
    arrays = {
      'row': np.int32(work.slot),
      'tokens_t': tokens,
      'next_t': following,
      'first': np.int32(first),
      'count': np.int32(count),
      'alternatives': np.bool_(ask.alternatives > 0),
    }
    arrays |= self._draws([work], rows=[0], size=1)
    keys = slots.keys_for(first + size, self.model.max_length)
    got = self._device.read(arrays, keys, ask.score_prompt)
    work.read = first + count
    self.counts.chunks += 1
    if ask.score_prompt:
      self._note_prompt(work, got, known)
    if work.read == work.prompt_length:
      if ask.max_new_tokens:
        self._take(work, _token(jax.device_get(got.drawn), 0, ask.alternatives))
      else:
        work.close('length')

  def _note_prompt(self, work: Work, got: slots.Read, known: list[int]) -> None:
    """Writes down how probable the tokens of a chunk's places were."""
    log_probs, ids, others = (
      np.asarray(x) for x in (got.log_prob_t, got.other_tA, got.other_log_prob_tA)
    )
    for i, token in enumerate(known):
      told = zip(ids[i].tolist(), others[i].tolist(), strict=True)
      work.prompt_tokens.append(
        Token(token, float(log_probs[i]), tuple(told)[: work.ask.alternatives])
      )

  def _step(self, works: list[Work]) -> None:
    """One more token of every sequence that is being answered."""
    if not works:
      return
    token, length = np.zeros(self.slots, np.int32), np.zeros(self.slots, np.int32)
    active = np.zeros(self.slots, bool)
    for work in works:
      token[work.slot], length[work.slot] = work.row[work.read], work.read
      active[work.slot] = True
    rows = [work.slot for work in works]
    arrays = {
      'token_b': token,
      'length_b': length,
      'active_b': active,
      'alternatives': np.bool_(any(work.ask.alternatives for work in works)),
    }
    arrays |= self._draws(works, rows, self.slots)
    drawn = self._device.step(arrays, slots.keys_for(int(length.max()) + 1, self.model.max_length))
    drawn = jax.device_get(drawn)
    self.counts.steps += 1
    self.counts.step_rows += len(works)
    for work in works:
      work.read += 1
      self._take(work, _token(drawn, work.slot, work.ask.alternatives))

  def _take(self, work: Work, token: Token) -> None:
    if not np.isfinite(token.log_prob):
      work.close('error', error=f'{self.model.name} gives logits that are not finite.')
      return
    room = min(work.ask.max_new_tokens, self.model.max_length - work.prompt_length)
    work.add(token, self.model.eos_ids, room)

  def _draws(self, works: list[Work], rows: list[int], size: int) -> dict[str, np.ndarray]:
    draw = slots.Draw.empty(size)
    for work, row in zip(works, rows, strict=True):
      sampling = work.ask.sampling
      draw.temperature[row] = sampling.temperature
      draw.top_k[row], draw.top_p[row] = sampling.top_k, sampling.top_p
      draw.seed[row], draw.count[row] = work.ask.seed, len(work.new)
    return draw_arrays(draw)


def _token(drawn: slots.Drawn, row: int, alternatives: int) -> Token:
  ids, log_probs = drawn.other_bA[row].tolist(), drawn.other_log_prob_bA[row].tolist()
  others = tuple(zip(ids, log_probs, strict=True))[:alternatives]
  experts = () if drawn.expert_bRk is None else tuple(map(tuple, drawn.expert_bRk[row].tolist()))
  return Token(int(drawn.token_b[row]), float(drawn.log_prob_b[row]), others, experts)
