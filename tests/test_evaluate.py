"""Evaluation end to end with a model that needs no network: files, resuming, cutting, comparing."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import zlib

import gin
import numpy as np
import pytest

from convert import sizes
from openmoe.config import ConfigError
from openmoe.evaluation import prompts, results
from openmoe.evaluation import run as evaluate
from openmoe.evaluation.items import EvaluationTask, Item, Prompt
from scripts import compare_evals, gin_flags
from scripts import evaluate as script
from scripts.gin_flags import files
from tasks.bigbench import lite
from tasks.evaluation import catalogue
from tests.evaluation_case import FakeModel, Silent
from tests.tasks import bigbench_case

ROOT = pathlib.Path(__file__).parent.parent


def config(tmp_path, **changes):
  fields = {'checkpoint': 'none', 'out_dir': str(tmp_path / 'out'), 'tasks': ('winowhy',)}
  return evaluate.EvaluationConfig(**(fields | changes))


@pytest.fixture
def tasks(tmp_path):
  bigbench_case.write(tmp_path, 'winowhy', bigbench_case.multiple_choice(7))
  bigbench_case.write(tmp_path, 'operators', bigbench_case.generative(5))
  return [task for n in ('winowhy', 'operators') for task in lite.evaluation_tasks(tmp_path, n, 2)]


def test_a_result_holds_what_is_needed_to_trust_it(tmp_path, tasks):
  model, display = FakeModel(), Silent()
  rows = evaluate.evaluate(model, tasks, config(tmp_path), display)
  assert [row.group for row in rows] == ['winowhy', 'operators', 'average']
  found = results.load_all(tmp_path / 'out')
  result = found[tasks[0].name]
  assert result['model'] == {'name': 'fake', 'fingerprint': 'f' * 64, 'dropped_fraction': 0.0}
  assert result['settings']['prompt_mode'] == 'fixed'
  assert {'tokenizer', 'bos', 'lost_shots', 'cut_prompts'} <= result.keys()
  items = tasks[0].items()
  assert [item['name'] for item in result['items']] == [item.name for item in items]
  for item, record in zip(items, result['items'], strict=True):
    assert record['prompt'] == item.prompt.text()
    encode = model.vocabulary.encode
    wanted = [
      FakeModel()._score(encode(item.prompt.text()), encode(choice)).log_prob
      for choice in item.choices
    ]
    assert record['log_probs'] == wanted
    best = float(item.scores[int(np.argmax(wanted))])
    assert record['measures']['multiple_choice_grade'] == best
  grade = result['metrics']['multiple_choice_grade']
  assert grade['value'] == np.mean(
    [r['measures']['multiple_choice_grade'] for r in result['items']]
  )
  assert grade['low95'] <= grade['value'] <= grade['high95']
  assert rows[0].normalised == pytest.approx(100 * (grade['value'] - 1 / 3) / (2 / 3))
  texts = found[tasks[1].name]['items']
  assert all(record['texts'] == ['1.'] for record in texts)
  # The answer to 'op 1' is '1', and no other is.
  assert rows[1].score == pytest.approx(1 / 5)
  summary = json.loads((tmp_path / 'out/summary.json').read_text())
  assert summary['rows'][-1]['normalised'] == pytest.approx(
    np.mean([rows[0].normalised, rows[1].normalised])
  )
  assert len((tmp_path / 'out/summary.csv').read_text().splitlines()) == 4


def test_chunks_do_not_change_anything(tmp_path, tasks):
  one = evaluate.evaluate_task(FakeModel(), tasks[0], config(tmp_path, chunk=2), Silent())
  other = config(tmp_path, out_dir=str(tmp_path / 'other'), chunk=100)
  two = evaluate.evaluate_task(FakeModel(), tasks[0], other, Silent())
  assert one == two


def test_finished_tasks_are_read_and_others_done(tmp_path, tasks):
  evaluate.evaluate(FakeModel(), tasks[:1], config(tmp_path), Silent())
  model, display = FakeModel(), Silent()
  evaluate.evaluate(model, tasks, config(tmp_path), display)
  assert display.ended == [(tasks[0].name, True), (tasks[1].name, False)]
  assert all(after == () for _, after in model.requests)
  with pytest.raises(ConfigError, match='Choose another OUT_DIR'):
    evaluate.evaluate(FakeModel(fingerprint='e'), tasks, config(tmp_path), Silent())
  with pytest.raises(ConfigError, match='settings'):
    evaluate.evaluate(FakeModel(), tasks, config(tmp_path, max_items=3), Silent())
  path = tmp_path / 'out' / results.file_name(tasks[0].name)
  path.write_text(path.read_text()[:-100])
  with pytest.raises(ConfigError, match='no whole JSON'):
    evaluate.evaluate(FakeModel(), tasks, config(tmp_path), Silent())


def encode(text):
  return [ord(c) for c in text]


def test_long_prompts_lose_shots_and_then_their_beginning():
  prompt = Prompt('question', ('first shot', 'second shot'), separator='|')
  fixed = lambda room: prompts.fit(prompt, room, encode, prompts.PromptMode.FIXED, 1024)
  assert fixed(100).text == 'first shot|second shot|question'
  assert (fixed(25).text, fixed(25).shots, fixed(25).cut) == ('second shot|question', 1, 0)
  assert (fixed(10).text, fixed(10).shots) == ('question', 0)
  assert (''.join(map(chr, fixed(5).ids)), fixed(5).cut) == ('stion', 3)


def test_reference_mode_cuts_the_question_as_the_original_did():
  prompt = Prompt('question', ('first shot', 'second shot'), separator='|')
  found = prompts.fit(prompt, 100, encode, prompts.PromptMode.REFERENCE, 12)
  assert ''.join(map(chr, found.ids)) == 'first shot|s'
  assert found.cut == len('first shot|second shot|question') - 12
  assert prompts.fit(prompt, 5, encode, prompts.PromptMode.REFERENCE, 12).cut == 26


def test_a_small_model_gets_all_choices_after_the_same_prompt(tmp_path, tasks):
  model = FakeModel(max_length=110)
  result = evaluate.evaluate_task(model, tasks[0], config(tmp_path), Silent())
  assert result['lost_shots'] > 0
  assert len(model.requests) == 3 * len(result['items'])
  contexts = {context for context, _ in model.requests}
  assert len(contexts) == len(result['items'])
  with pytest.raises(ConfigError, match='leave none of the 3 of the model'):
    evaluate.evaluate_task(
      FakeModel(3), tasks[0], config(tmp_path, out_dir=str(tmp_path / 'b')), Silent()
    )


def test_joint_tokens_end_in_the_choice_and_eos_follows_if_asked(tmp_path):
  items = [Item('0', Prompt('ab'), ('c', ' d'), (1.0, 0.0))]
  measure = lambda item, prediction: {'acc': 1.0}
  task = EvaluationTask('t', 't', lambda: items, 'acc', measure, joint=True, append_eos=True)
  model = FakeModel()
  evaluate.evaluate_task(model, task, config(tmp_path), Silent())
  assert model.requests == [((100, 101), (102, 1)), ((100, 101), (35, 103, 1))]


def test_bootstrap_is_of_the_right_width_and_repeatable():
  values = np.random.default_rng(0).normal(size=400)
  means = results.bootstrap(values, 4000, seed=1)
  assert np.mean(means) == pytest.approx(np.mean(values), abs=0.01)
  assert np.std(means) == pytest.approx(np.std(values) / 20, rel=0.05)
  assert np.array_equal(means, results.bootstrap(values, 4000, seed=1))
  assert results.interval(results.bootstrap([1.0] * 5, 100, 0)) == [1.0, 1.0]


def test_a_known_score_is_normalised_as_published():
  record = lambda right: {'measures': {'m': float(right)}}
  result = {
    'task': 't',
    'group': 'known_unknowns',
    'metric': 'm',
    'low': 0.5,
    'high': 1.0,
    'shots': 3,
    'in_average': True,
    'model': {'dropped_fraction': 0.0},
    'items': [record(i < 20) for i in range(46)],
  }
  assert results.summarise([result], 100, 0)[0].normalised == pytest.approx(-13.04, abs=0.005)


def test_second_kinds_have_a_row_and_do_not_count_in_the_average(tmp_path, tasks):
  aside = dataclasses.replace(tasks[1], group='aside', in_average=False, name='other')
  rows = evaluate.evaluate(FakeModel(), [*tasks, aside], config(tmp_path), Silent())
  assert [row.group for row in rows] == ['winowhy', 'operators', 'aside', 'average']
  assert rows[3].normalised == pytest.approx((rows[0].normalised + rows[1].normalised) / 2)


def test_the_average_of_many_tasks_is_surer_than_each():
  items = [{'measures': {'m': float(i % 2)}} for i in range(50)]
  make = lambda k: {
    'task': f't{k}',
    'group': f'g{k}',
    'metric': 'm',
    'low': 0.0,
    'high': 1.0,
    'shots': 0,
    'in_average': True,
    'model': {'dropped_fraction': 0.0},
    'items': items,
  }
  rows = results.summarise([make(k) for k in range(16)], 4000, 0)
  widths = [row.normalised95[1] - row.normalised95[0] for row in rows]
  # Independent samples of one variance: a quarter of the width of one of them.
  assert widths[-1] == pytest.approx(np.mean(widths[:-1]) / 4, rel=0.1)


def compare(tmp_path, capsys, *arguments):
  assert compare_evals.main([str(tmp_path / 'a'), str(tmp_path / 'b'), *arguments]) == 0
  return capsys.readouterr().out


def test_comparing_tells_causes_apart(tmp_path, tasks, capsys):
  run = lambda name, model, task=tasks[0]: evaluate.evaluate_task(
    model, task, config(tmp_path, out_dir=str(tmp_path / name)), Silent()
  )
  run('a', FakeModel())
  run('b', FakeModel(shift=1e-6))
  found = json.loads(compare(tmp_path, capsys, '--json'))[tasks[0].name]
  assert {change['why'] for change in found['changes']} == {'numerics'}
  assert not any(change['outcome'] for change in found['changes'])
  shown = compare(tmp_path, capsys, '--all')
  assert '7 of 7 items differ (numerics 7), the figure of 0' in shown
  assert 'moved by' in shown
  one = results.load_all(tmp_path / 'a')[tasks[0].name]
  assert results.compare(one, one) == []
  other = json.loads(json.dumps(one))
  other['model']['fingerprint'] = 'e'
  other['items'][0]['prompt'] += '!'
  other['items'][1]['tokens'] = 'x'
  other['items'][2]['log_probs'] = other['items'][2]['log_probs'][::-1]
  other['items'][3]['name'] = 'new'
  why = {change.item: change.why for change in results.compare(one, other)}
  names = [item['name'] for item in one['items'][:4]]
  assert why == dict(zip(names, ('prompt', 'tokens', 'model', 'missing'), strict=True)) | {
    'new': 'missing'
  }


def test_comparing_bad_input_is_named(tmp_path, capsys):
  assert compare_evals.main([str(tmp_path), str(tmp_path)]) == 64
  assert 'holds no result files' in capsys.readouterr().err
  (tmp_path / 'x.json').write_text('{"a": 1}')
  assert compare_evals.main([str(tmp_path / 'x.json'), str(tmp_path)]) == 64
  assert 'no result file of format' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('field', 'value', 'rule'),
  [
    ('prompt_mode', 'refrence', "one of \\['reference', 'fixed'\\]"),
    ('tasks', 'triviaqa', 'tuple of names'),
    ('shots', -1, '0 or more'),
    ('max_items', 0, 'at least 1'),
  ],
)
def test_bad_settings_are_named(tmp_path, field, value, rule):
  with pytest.raises(ConfigError, match=rule):
    config(tmp_path, **{field: value})


def test_the_script_prints_a_table_and_resumes(tmp_path, monkeypatch, capsys):
  bigbench_case.write(tmp_path, 'winowhy', bigbench_case.multiple_choice(7))
  bigbench_case.write(tmp_path, 'operators', bigbench_case.generative(5))
  monkeypatch.setattr(script, 'load_model', lambda config: FakeModel())
  chosen = config(tmp_path, tasks=('winowhy', 'operators'), shots=1)
  options = catalogue.TaskOptions(bigbench_dir=str(tmp_path))
  script.run(chosen, options)
  shown = capsys.readouterr().out
  for word in ('winowhy', 'operators', 'average', 'normalised'):
    assert word in shown
  assert all(len(line) <= 80 for line in shown.splitlines() if '│' in line or ' to ' in line)
  script.run(chosen, options)
  assert shown.count('from an earlier run') == 0
  assert capsys.readouterr().out.count('from an earlier run') == 2


def test_the_fake_model_is_a_checksum():
  assert FakeModel()._score([1], [2]).log_prob == pytest.approx(
    np.log((zlib.crc32(b'[1, 2]') + 1) / 2**33)
  )


def test_the_gin_file_binds_every_setting():
  path = ROOT / 'gin' / 'runs' / 'eval.gin'
  assert files.required([path.read_text()]) == ['CHECKPOINT', 'TASKS', 'OUT_DIR']
  gin.parse_config_file(str(path))
  gin.parse_config("CHECKPOINT = 'c'\nTASKS = ('winowhy',)\nOUT_DIR = 'o'")
  bound = gin_flags.bindings('evaluate.EvaluationConfig')
  found = evaluate.EvaluationConfig(**bound)
  assert found == evaluate.EvaluationConfig('c', 'o', ('winowhy',))
  assert gin_flags.bindings('catalogue.TaskOptions') == dataclasses.asdict(catalogue.TaskOptions())
  # What has no macro has its reason: neither changes a figure.
  fields = {field.name for field in dataclasses.fields(found)}
  assert fields - set(bound) == {'chunk', 'resamples'}


@pytest.mark.parametrize(
  ('variables', 'said'),
  [
    ({'MODEL': 'openmoe_tny'}, 'is not in gin/models; there are: jetmoe_8b'),
    ({'CHECKPOINT': 'runs/nowhere'}, "there is no runs/nowhere; 'bash scripts/run_pretrain.sh'"),
  ],
)
def test_run_eval_names_what_is_missing(variables, said):
  done = subprocess.run(
    ['bash', str(ROOT / 'scripts' / 'run_eval.sh')],
    env={**os.environ, **variables},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1
  assert said in done.stderr


def test_a_checkpoint_of_another_model_is_refused():
  tiny = sizes.named('openmoe_tiny')
  script.check_sizes(tiny, 'openmoe_tiny', 'run')
  with pytest.raises(ConfigError, match='run has num_layers .* MODEL=openmoe_8b has 24'):
    script.check_sizes(tiny, 'openmoe_8b', 'run')
