"""Generation: equal to the full forward pass, whatever the batch, the mesh and the chunks."""

import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe.config import ConfigError
from openmoe.inference.continuation import Continuation
from openmoe.inference.decode import Sampling, sample
from openmoe.inference.model import CapacityWarning, LanguageModel, bucket, row_keys
from openmoe.inference.rows import Rows
from tests.inference import case

PROMPTS = [[5, 9, 33, 8, 60], [7], [11, 12, 50, 3, 3, 4, 9], [40, 41], [22, 21, 20]]
NEW = 6


def tokens(results) -> list[list[tuple[int, ...]]]:
  return [[g.tokens for g in found] for found in results]


@pytest.fixture(scope='module', params=['openmoe', 'jetmoe'])
def name(request) -> str:
  return request.param


@pytest.fixture(scope='module')
def batched(name):
  """Greedy continuations of all prompts, in batches of four rows."""
  return case.model(name).generate(PROMPTS, NEW)


def test_cached_decoding_equals_the_full_forward(name, batched):
  for prompt, (found,) in zip(PROMPTS, batched, strict=True):
    assert list(found.tokens) == case.full_greedy(name, prompt, NEW)
    logits = jax.nn.log_softmax(case.full_logits(name, [*prompt, *found.tokens]))
    for i, (token, log_prob) in enumerate(zip(found.tokens, found.log_probs, strict=True)):
      assert log_prob == pytest.approx(float(logits[len(prompt) + i, token]), abs=2e-5)


def test_batched_padded_shuffled_and_single_agree(name, batched):
  model = case.model(name)
  for prompt, found in zip(PROMPTS, batched, strict=True):
    assert tokens(model.generate([prompt], NEW)) == tokens([found])  # alone
  order = [3, 0, 4, 2, 1]
  shuffled = model.generate([PROMPTS[i] for i in order], NEW)
  assert tokens(shuffled) == tokens([batched[i] for i in order])
  # Beside a prompt of another bucket, all are padded further.
  padded = model.generate([list(range(2, 22)), *PROMPTS], NEW)
  assert tokens(padded[1:]) == tokens(batched)


def test_sharded_equals_unsharded(name, batched):
  sharded = case.model(name, 2)
  assert dict(sharded.mesh.shape) == {'data': 4, 'expert': 1, 'model': 2}
  assert tokens(sharded.generate(PROMPTS, NEW)) == tokens(batched)
  assert sharded.fingerprint == case.model(name).fingerprint


def test_draws_depend_on_seed_and_prompt_alone():
  model, sampling = case.model('openmoe'), Sampling(temperature=1.0, top_k=20, top_p=0.95)
  draw = lambda prompts, **kw: tokens(model.generate(prompts, NEW, sampling=sampling, **kw))
  pair = draw([PROMPTS[0], PROMPTS[2]], samples=2, seed=5)
  assert draw([PROMPTS[2], PROMPTS[0]], samples=2, seed=5) == pair[::-1]
  assert pair[0][0] != pair[0][1]  # two samples of one prompt
  assert draw([PROMPTS[0], PROMPTS[2]], samples=2, seed=6) != pair


def test_equal_prompts_draw_on_from_each_other():
  keys = row_keys([[4, 5], [6], [4, 5]], samples=2, seed=0)
  assert len(set(keys.reshape(-1).tolist())) == 6
  np.testing.assert_array_equal(keys[[0, 2]].reshape(1, 4), row_keys([[4, 5]], 4, seed=0))


def test_stop_strings_end_a_text_wherever_tokens_end(name, batched):
  """A stop string across the border of two tokens, looked for every few tokens."""
  model = case.model(name)
  (whole,) = batched[0]
  stop = whole.text[2:4]
  at = whole.text.index(stop)
  shown: list[str] = []
  for show in (None, shown.append):
    (found,) = model.generate([PROMPTS[0]], NEW, stop=['\n', stop], show=show)[0]
    assert (found.text, found.finish) == (whole.text[:at], 'stop')
    assert found.tokens == whole.tokens[: at + 2]
    assert found.log_probs == pytest.approx(whole.log_probs[: at + 2], abs=1e-6)
  assert ''.join(shown) == found.text


def test_room_ends_a_text():
  model = case.model('openmoe')
  long = [3] * (model.max_length - 3)
  (found,) = model.generate([long], 10)[0]
  assert (len(found.tokens), found.finish) == (2, 'length')


def test_a_long_neighbour_takes_no_room_away():
  model = case.model('openmoe')
  long, short = [3] * (model.max_length - 3), [5, 9]
  (alone,), (beside,) = model.generate([short], 12)[0], model.generate([long, short], 12)[1]
  assert beside.tokens == alone.tokens and beside.finish == alone.finish
  assert len(alone.tokens) == 12 or alone.finish == 'eos'


def test_any_of_several_tokens_ends_a_text():
  (free,) = case.model('openmoe').generate([PROMPTS[0]], NEW)[0]
  second = free.tokens[-1]
  at = free.tokens.index(second)
  (found,) = case.model('openmoe', eos_ids=(1, second)).generate([PROMPTS[0]], NEW)[0]
  assert (found.tokens, found.finish) == (free.tokens[:at], 'eos')


class Spaced(case.Numbers):
  """Drops the space that a text begins with, as SentencePiece does with its dummy prefix."""

  def decode(self, ids) -> str:
    return super().decode(ids).replace(chr(60 + 9), ' ').removeprefix(' ')


def test_a_text_is_what_follows_the_prompt_in_the_decoded_whole():
  assert Continuation(Spaced(), [5, 6]).text([9, 9, 7]) == '  C'
  assert Continuation(Spaced(), []).text([9, 7]) == 'C'


class Bytes:
  """Ids from 10 on are bytes; a run of them that is no character is shown as U+FFFD."""

  def decode(self, ids) -> str:
    return ''.join(chr(60 + i) if i < 10 else '' for i in ids[:1]) + bytes(
      i - 10 for i in ids if i >= 10
    ).decode('utf-8', 'replace')

  def is_byte(self, token: int) -> bool:
    return token >= 10


@pytest.mark.parametrize('every', [1, 2, 3])
def test_everything_is_shown_in_the_end_though_bytes_change_what_stood_there(every):
  ids = [5, 10 + 0x41, 10 + 0xC3, 10 + 0xA9, 10 + 0xE6, 10 + 0x42]
  rows = Rows.__new__(Rows)
  rows._model = types.SimpleNamespace(eos_ids=(1,))
  rows._ends, rows._texts, rows._limits = {}, [Continuation(Bytes(), [])], np.array([99])
  shown, out = '', []
  for step in [*range(every, len(ids), every), len(ids)]:
    state = types.SimpleNamespace(tokens_bW=np.array([ids]), step=step)
    shown = rows._show(state, np.array([step == len(ids)]), shown, out.append)
  assert ''.join(out) == Bytes().decode(ids) == 'AAé\ufffdB'


def test_weights_that_are_no_numbers_end_generation():
  whole = case.model('openmoe')
  broken = jax.tree.map(lambda x: x * np.nan, case.parameters('openmoe'))
  model = LanguageModel(whole.config, broken, case.Numbers(), max_length=64, name='broken:7')
  with pytest.raises(ConfigError, match='broken:7 gives logits that are not finite'):
    model.generate([[3, 4]], 4)


def test_capacity_warns_once_where_something_was_dropped():
  model = case.model('openmoe', capacity=True)
  with pytest.warns(CapacityWarning, match='routes with capacity') as seen:
    model.generate([[3] * 30, [3] * 30], 2)
  assert len(seen) == 1
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    model.generate([[3] * 30, [3] * 30], 2)
  assert 0 < model.dropped_fraction < 1
  assert case.model('openmoe').dropped_fraction == 0.0
  with pytest.raises(ConfigError, match='knows no capacity'):
    case.model('jetmoe', capacity=True)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda m: m.generate([], 4), '0 prompts'),
    (lambda m: m.generate([[3]], 0), 'max_new_tokens=0'),
    (lambda m: m.generate([[3] * 63], 4), 'Prompt 0 needs 65 tokens .* max_length=64 .* shorten'),
    (lambda m: m.generate([[3]], 4, stop=['']), 'empty string'),
    (lambda m: m.generate([[3, 64]], 4), 'Prompt 0 has the token 64; .* vocab_size=64'),
    (lambda m: m.generate([[3]], 4, samples=2, show=print), 'cannot be shown'),
    (lambda m: m.score([([3] * 60, [4] * 9)]), 'Request 0 needs 70 tokens .* cut its context'),
  ],
)
def test_what_cannot_run_is_refused_by_name(call, message):
  with pytest.raises(ConfigError, match=message):
    call(case.model('openmoe'))


def test_an_empty_prompt_begins_at_the_start_token(name):
  (found,) = case.model(name).generate([[]], 1)[0]
  assert list(found.tokens) == case.full_greedy(name, [], 1)


def test_sampling_keeps_to_its_limits():
  logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))

  def draw(**limits) -> set[int]:
    s = Sampling(**limits)
    keys = [jax.random.key(i)[None] for i in range(60)]
    return {
      int(sample(logits, s.program, max(s.temperature, 1e-6), s.top_p, key)[0]) for key in keys
    }

  assert draw() == {0}
  assert draw(temperature=1.0, top_k=2) == {0, 1}
  assert draw(temperature=1.0, top_p=0.9) == {0, 1, 2}
  assert draw(temperature=5.0) == {0, 1, 2, 3}


def test_buckets_are_few_and_large_enough():
  sizes = {bucket(n) for n in range(1, 2049)}
  assert sizes == {16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048}
  assert all(n <= bucket(n) < max(17, 1.51 * n) for n in range(1, 2049))
  assert bucket(100, most=110) == 110
