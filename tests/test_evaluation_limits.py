"""What an evaluation refuses to score or to write, and tokens at the seam of prompt and choice."""

from __future__ import annotations

import csv
import dataclasses
import json
import math

import numpy as np
import pytest
from etils import epath

from convert import sizes
from openmoe.config import ConfigError, ModelConfig
from openmoe.evaluation import prompts, results
from openmoe.evaluation import run as evaluate
from openmoe.evaluation.items import EvaluationTask, Item, Prompt
from openmoe.inference.placement import config_digest
from tasks.evaluation import catalogue
from tests.evaluation_case import FakeModel, Silent


class Merging:
  """A vocabulary of characters and of the pairs in `pairs`; `lost` is dropped at the end."""

  eos_id, vocab_size = 1, 1 << 24

  def __init__(self, *pairs: str, lost: str = ''):
    self.pairs, self.lost = pairs, lost

  def encode(self, text):
    found, i = [], 0
    text = text.removesuffix(self.lost) if self.lost else text
    while i < len(text):
      step = 2 if text[i : i + 2] in self.pairs else 1
      found.append(sum(ord(c) << (8 * k) for k, c in enumerate(text[i : i + step])))
      i += step
    return found


A, B, C = map(ord, 'abc')


@pytest.mark.parametrize(
  ('vocabulary', 'context', 'continuation', 'wanted'),
  [
    (Merging(), 'a', 'b', ([A], [B])),
    (Merging(), 'a  ', 'b', ([A], [32, 32, B])),
    (Merging(), '', 'b', ([], [B])),
    # It melts into the last token, which is the first of the two that differs.
    (Merging('ab'), 'a', 'b', ([], [A + (B << 8)])),
    (Merging('ab'), 'ca', 'b', ([C], [A + (B << 8)])),
    # As in the harness, the context's own number of tokens is what goes before.
    (Merging('ab'), 'a', 'bc', ([A + (B << 8)], [C])),
    # The tokenizer drops it where it follows, and alone it is a token.
    (Merging(lost='ab'), 'a', 'b', ([A], [B])),
    (Merging(), 'a', '', ([A], [])),
  ],
)
def test_a_continuation_begins_where_its_context_ends(vocabulary, context, continuation, wanted):
  assert prompts.split(vocabulary.encode, context, continuation) == wanted


def task(items, **changes):
  measure = lambda item, prediction: {'acc': prediction.log_probs[0] if items[0].choices else 1.0}
  return EvaluationTask('t', 't', lambda: items, 'acc', measure, **({'joint': True} | changes))


def run(tmp_path, chosen, model=None, **settings):
  settings = {
    'checkpoint': 'somewhere',
    'out_dir': str(tmp_path / 'out'),
    'tasks': ('t',),
  } | settings
  config = evaluate.EvaluationConfig(**settings)
  return evaluate.evaluate_task(model or FakeModel(), chosen, config, Silent())


def merged(model, *pairs):
  model.vocabulary = Merging(*pairs)
  return model


def test_a_choice_that_melts_into_the_prompt_is_not_certain(tmp_path):
  model = merged(FakeModel(), 'ab')
  found = run(tmp_path, task([Item('0', Prompt('ca'), ('b', 'c'), (1.0, 0.0))]), model)
  assert model.requests == [((C,), (A + (B << 8),)), ((C, A), (C,))]
  assert all(value < 0 for value in found['items'][0]['log_probs'])


def test_prompt_and_choice_together_fit_where_they_are_more_tokens_than_apart(tmp_path):
  class Longer(Merging):
    def encode(self, text):
      return [ord(c) for c in text] + ([9] * 4 if 'ax' in text else [])

  model = FakeModel(max_length=10)
  model.vocabulary = Longer()
  item = Item('0', Prompt('qqa', ('sss',), separator=''), ('x', 'y'), (1.0, 0.0))
  found = run(tmp_path, task([item], shots=1), model)
  # With its shot 6 + 1 tokens fit, but 6 + 1 + 4 do not.
  assert found['lost_shots'] == 1
  assert [len(context) + len(after) for context, after in model.requests] == [8, 4]
  with pytest.raises(ConfigError, match='leave none of the 5 of the model'):
    run(tmp_path / 'b', task([item]), dataclass_copy(model, 5))


def dataclass_copy(model, length):
  other = FakeModel(max_length=length)
  other.vocabulary = model.vocabulary
  return other


def test_a_question_that_is_cut_keeps_the_tokens_of_the_whole_text(tmp_path):
  model = merged(FakeModel(max_length=4), 'ab')
  run(tmp_path, task([Item('0', Prompt('ccca'), ('b', 'c'), (1.0, 0.0))]), model)
  assert model.requests == [((C, C), (A + (B << 8),)), ((C, A), (C,))]


@pytest.mark.parametrize('joint', [True, False])
def test_an_empty_choice_is_refused(tmp_path, joint):
  chosen = task([Item('0', Prompt('c'), ('', 'c'), (1.0, 0.0))], joint=joint)
  with pytest.raises(ConfigError, match="choice '' of item 0 has no tokens and would be certain"):
    run(tmp_path, chosen, merged(FakeModel()))


class Broken(FakeModel):
  """Gives `value` for every token."""

  value = math.nan

  def _score(self, context, after):
    score = super()._score(context, after)
    return dataclasses.replace(score, log_prob=self.value)

  def generate(self, *args, **options):
    return [
      [dataclasses.replace(g, log_probs=(self.value,)) for g in row]
      for row in super().generate(*args, **options)
    ]


@pytest.mark.parametrize('value', [math.nan, -math.inf, math.inf])
def test_a_model_that_gives_no_numbers_gets_no_score(tmp_path, value):
  model = Broken()
  model.value = value
  ranked = task([Item('7', Prompt('c'), ('a', 'b'), (1.0, 0.0))])
  with pytest.raises(ConfigError, match='fake gives a choice of t item 7 .* not finite'):
    run(tmp_path, ranked, model)
  written = task([Item('7', Prompt('c'), answers=('a',))])
  with pytest.raises(ConfigError, match='fake gives its text for t item 7 .* not finite'):
    run(tmp_path, written, model)
  assert list((tmp_path / 'out').iterdir()) == []


def test_a_figure_that_is_no_number_is_not_written(tmp_path):
  measure = lambda item, prediction: {'acc': math.nan}
  chosen = dataclasses.replace(task([Item('0', Prompt('c'), answers=('a',))]), measure=measure)
  with pytest.raises(ConfigError, match='a figure is not finite'):
    run(tmp_path, chosen)
  assert list((tmp_path / 'out').iterdir()) == []


def test_tasks_without_items_and_items_of_one_name_are_named(tmp_path):
  with pytest.raises(ConfigError, match='t: no item is left'):
    run(tmp_path, task([]))
  twice = Item('0', Prompt('c'), answers=('a',))
  with pytest.raises(ConfigError, match="t: 1 items are there more than once, such as '0'"):
    run(tmp_path, task([twice, twice]))


def test_no_more_shots_are_shown_than_there_are():
  prompt = Prompt('q', ('a', 'b', 'c'), separator='|')
  assert [prompt.text(n) for n in (5, 3, 1, 0)] == ['a|b|c|q', 'a|b|c|q', 'c|q', 'q']


def test_the_result_names_the_checkpoint_and_is_strict_json(tmp_path):
  run(tmp_path, task([Item('0', Prompt('c'), ('a', 'b'), (1.0, 0.0))]))
  text = (tmp_path / 'out/t.json').read_text(encoding='utf-8')

  def no(constant):
    raise AssertionError(constant)

  assert json.loads(text, parse_constant=no)['checkpoint'] == 'somewhere'


def test_the_table_as_csv_is_quoted(tmp_path):
  row = results.Row('a, "b"\n', 'm', 0.5, 0.1, 0.9, 50.0, (1.0, 2.0), 3, 0, 0.0)
  results.save_summary(epath.Path(tmp_path), [row], {})
  with (tmp_path / 'summary.csv').open(newline='') as file:
    (found,) = csv.DictReader(file)
  assert (found['group'], found['score'], found['dropped']) == ('a, "b"\n', '0.5', '0.0')


def _without(key):
  return lambda result: result.pop(key)


@pytest.mark.parametrize(
  ('damage', 'said'),
  [
    (_without('items'), 'has no items'),
    (lambda r: r.update(items=[]), 'has no items'),
    (lambda r: r.update(items=[1]), 'has no name for item 1'),
    (lambda r: r['items'][0]['measures'].update(acc='x'), 'has no acc for item 1'),
    (lambda r: r['items'][0].update(name=3), 'has no name for item 1'),
    (lambda r: r.update(model=[]), 'has no model'),
    (lambda r: r['model'].pop('fingerprint'), 'does not say which model'),
    (lambda r: r.update(low='0'), "no range of scores, but '0' to 1.0"),
    (lambda r: r['items'].append(r['items'][0]), 'items of the same name'),
    (lambda r: r['items'][0].update(log_probs=[None]), 'no list of numbers'),
    (lambda r: r.update(format=2), 'no result file of format 1'),
  ],
)
def test_result_files_of_another_form_are_named(tmp_path, damage, said):
  run(tmp_path, task([Item('0', Prompt('c'), ('a', 'b'), (1.0, 0.0))]))
  path = tmp_path / 'out/t.json'
  result = json.loads(path.read_text())
  damage(result)
  path.write_text(json.dumps(result))
  with pytest.raises(ConfigError, match=said):
    results.load(path)


def test_results_nested_too_deeply_are_named(tmp_path):
  (tmp_path / 'x.json').write_text('[' * 100_000)
  with pytest.raises(ConfigError, match='no whole JSON'):
    results.load(tmp_path / 'x.json')


@pytest.mark.parametrize(
  ('field', 'value', 'rule'),
  [
    ('shots', '3', 'whole number, 0 or more, or None'),
    ('samples', None, 'whole number, at least 1'),
    ('max_items', 1.5, 'whole number, at least 1, or None'),
    ('seed', -1, 'whole number, 0 or more'),
    ('max_length', True, 'at least 2'),
    ('temperature', math.nan, 'number of 0 or more'),
    ('temperature', -0.1, 'number of 0 or more'),
    ('tasks', (3,), 'tuple of names'),
    ('tasks', None, 'tuple of names'),
  ],
)
def test_settings_of_other_types_are_named(tmp_path, field, value, rule):
  of_tasks = field in ('samples', 'temperature')
  make = catalogue.TaskOptions if of_tasks else evaluate.EvaluationConfig
  given = {} if of_tasks else {'checkpoint': 'c', 'out_dir': 'o', 'tasks': ('t',)}
  with pytest.raises(ConfigError, match=f'{field}=.*{rule}'):
    make(**(given | {field: value}))


def test_scores_that_numpy_gives_are_numbers_too():
  prompts.check_finite(np.float32([-1.0, -2.0]), 'm', 'x')
  with pytest.raises(ConfigError, match='m gives x the log-probability nan'):
    prompts.check_finite(np.float32([-1.0, np.nan]), 'm', 'x')


def test_a_new_field_at_its_default_leaves_fingerprints_as_they_are():
  config = sizes.named('openmoe_tiny')
  later = dataclasses.make_dataclass(
    'Later', [('depth_scale', float, 1.0)], bases=(ModelConfig,), frozen=True
  )
  fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
  assert config_digest(later(**fields)) == config_digest(config)
  assert config_digest(later(**fields, depth_scale=2.0)) != config_digest(config)
  moe = dataclasses.replace(config.moe, top_k=1)
  others = [dataclasses.replace(config, norm_epsilon=1e-3), dataclasses.replace(config, moe=moe)]
  assert len({config_digest(c) for c in (config, *others)}) == 3
