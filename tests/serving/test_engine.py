"""The engine: answers alone and in company, slots that are shared, ends, refusals."""

import dataclasses
import threading

import jax
import numpy as np
import pytest

from openmoe.config import ConfigError
from openmoe.inference.decode import Sampling
from openmoe.inference.model import LanguageModel, row_keys
from openmoe.inference.placement import inference_mesh
from openmoe.serving import slots
from openmoe.serving.engine import Engine
from openmoe.serving.request import Ask, Overloaded
from tests.inference import case

LENGTH = 600  # prompts may be longer than the largest chunk


class Asker:
  """Sends sequences and waits for all of what comes."""

  def __init__(self, engine: Engine):
    self.engine = engine

  def send(self, asks):
    self.events = [[] for _ in asks]
    self.ended = [threading.Event() for _ in asks]

    def tell(event, i):
      self.events[i].append(event)
      if event.finish is not None:
        self.ended[i].set()

    tells = [lambda event, i=i: tell(event, i) for i in range(len(asks))]
    self.works = self.engine.submit(asks, tells)
    return self

  def wait(self):
    for ended in self.ended:
      assert ended.wait(120)
    return [
      (
        ''.join(e.text for e in events),
        tuple((t.id, t.log_prob) for e in events for t in e.tokens),
        events[-1].finish,
      )
      for events in self.events
    ]


def ask(engine, *asks):
  return Asker(engine).send(asks).wait()


@pytest.fixture(scope='module', params=['openmoe', 'jetmoe'])
def engine(request):
  model = case.model(request.param, max_length=LENGTH)
  engine = Engine(model, 4, 8)
  engine.start()
  yield engine
  engine.stop()


def test_answers_are_those_of_the_model_alone(engine):
  rng = np.random.default_rng(0)
  prompts = [rng.integers(2, 60, n).tolist() for n in (1, 15, 16, 40)]
  drawing = Sampling(0.9, 12, 0.8)
  for sampling in (Sampling(), drawing):
    expected = engine.model.generate(prompts, 10, sampling=sampling, seed=7)
    seeds = row_keys(prompts, 1, 7)[:, 0]
    asks = [
      Ask(tuple(p), 10, sampling=sampling, seed=int(s)) for p, s in zip(prompts, seeds, strict=True)
    ]
    for (text, tokens, finish), (theirs,) in zip(ask(engine, *asks), expected, strict=True):
      assert tuple(i for i, _ in tokens) == theirs.tokens
      np.testing.assert_allclose([p for _, p in tokens], theirs.log_probs, atol=2e-5)
      assert (text, finish) == (theirs.text, theirs.finish)


def test_an_answer_is_the_same_to_the_bit_in_any_company(engine):
  rng = np.random.default_rng(1)
  mine = Ask(tuple(rng.integers(2, 60, 300).tolist()), 12)
  (alone,) = ask(engine, mine)
  others = [
    Ask(tuple(rng.integers(2, 60, n).tolist()), 40, sampling=Sampling(1.0), seed=n)
    for n in (3, 550, 77, 20, 5, 9)
  ]
  noise, crowd = Asker(engine).send(others[:3]), Asker(engine)
  crowd.send([mine, *others[3:]])
  assert crowd.wait()[0] == alone
  noise.wait()


def test_whole_chunks_of_an_earlier_prompt_are_not_read_again(engine):
  rng = np.random.default_rng(2)
  prompt = tuple(rng.integers(2, 60, 290).tolist())
  before = dataclasses.replace(engine.counts)
  first, second = ask(engine, Ask(prompt, 6)), ask(engine, Ask(prompt, 6))
  changed = ask(engine, Ask((*prompt[:280], 5, 6), 6))
  assert second == first
  assert engine.counts.reused_tokens - before.reused_tokens == 2 * max(slots.CHUNKS)
  # Two at once: one of them copies the slot of the other.
  assert ask(engine, Ask(prompt, 6), Ask((*prompt[:280], 5, 6), 6)) == [*first, *changed]


def test_the_probabilities_of_a_prompt_are_those_of_scoring(engine):
  rng = np.random.default_rng(3)
  prompt = tuple(rng.integers(2, 60, 70).tolist())
  asker = Asker(engine).send([Ask(prompt, 0, alternatives=3, score_prompt=True)])
  asker.wait()
  (event,) = asker.events[0]
  assert (event.finish, event.text, event.tokens) == ('length', '', ())
  assert tuple(t.id for t in event.prompt) == prompt
  (score,) = engine.model.score([((), prompt)])
  np.testing.assert_allclose([t.log_prob for t in event.prompt], score.token_log_probs, atol=2e-5)
  for token in event.prompt:
    assert len(token.others) == 3
    logs = [p for _, p in token.others]
    assert logs == sorted(logs, reverse=True) and logs[0] >= token.log_prob - 1e-6


def test_stop_strings_and_limits_end_an_answer_where_generation_ends_it(engine):
  prompt = (5, 9, 13)
  (free,) = engine.model.generate([list(prompt)], 12)[0]
  stop = free.text[4:6]
  (theirs,) = engine.model.generate([list(prompt)], 12, stop=[stop])[0]
  ((text, tokens, finish),) = ask(engine, Ask(prompt, 12, stop=(stop,)))
  assert (text, finish, len(tokens)) == (theirs.text, theirs.finish, len(theirs.tokens))
  longest = tuple([3] * (LENGTH - 4))
  ((_, tokens, finish),) = ask(engine, Ask(longest, 50))
  assert (len(tokens) == 3 and finish == 'length') or finish == 'eos'


def test_who_leaves_frees_a_slot_and_who_is_late_is_told(engine):
  asker = Asker(engine).send([Ask((3, 4), 500, sampling=Sampling(1.0), seed=i) for i in range(4)])
  for work in asker.works:
    work.cancel()
  late = Asker(engine).send([Ask((3, 4), 4, deadline=0.0)])
  assert late.ended[0].wait(60)
  assert (late.events[0][-1].finish, late.events[0][-1].error) == (
    'time',
    'The time for an answer is over.',
  )
  assert ask(engine, Ask((3, 4), 4))
  assert engine.load() == {'waiting': 0, 'reading': 0, 'answering': 0} or engine.load()


def test_a_full_queue_refuses_all_of_a_request(engine):
  with pytest.raises(Overloaded, match='at most 8 may') as error:
    Asker(engine).send([Ask((3, 4), 4)] * 13)
  assert error.value.retry_after >= 1


@pytest.mark.parametrize(
  ('prompt', 'message'),
  [
    ((64,), 'has the token 64; .* vocab_size=64'),
    ((3,) * LENGTH, f'The prompt has {LENGTH} tokens, and .* takes at most {LENGTH - 2}'),
  ],
)
def test_prompts_that_cannot_be_are_refused(engine, prompt, message):
  with pytest.raises(ConfigError, match=message):
    engine.check(Ask(prompt, 4))


def test_weights_split_over_devices_give_the_same_tokens():
  config = case.CONFIGS['openmoe']
  mesh = inference_mesh(config, jax.devices()[:2], 2)
  model = LanguageModel(
    config, case.parameters('openmoe'), case.Numbers(), mesh=mesh, max_length=64
  )
  engine = Engine(model, 2, 4)
  engine.start()
  try:
    for (text, _, _), (theirs,) in zip(
      ask(engine, Ask((5, 6, 7), 8), Ask((9,), 8)),
      case.model('openmoe').generate([[5, 6, 7], [9]], 8),
      strict=True,
    ):
      assert text == theirs.text
  finally:
    engine.stop()
  with pytest.raises(ConfigError, match="a mesh of .*'data': 4.* splits weights alone"):
    Engine(case.model('openmoe', 2))


def test_models_that_drop_tokens_are_refused():
  with pytest.raises(ConfigError, match='routes with capacity, by which answers depend'):
    Engine(case.model('openmoe', capacity=True))
  with pytest.raises(ConfigError, match='slots=0'):
    Engine(case.model('openmoe'), 0)
