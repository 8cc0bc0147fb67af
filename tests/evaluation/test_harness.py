"""The evaluation harness's view of a model; with the harness itself where it is installed."""

import dataclasses
import json
import math
import pathlib

import pytest

from openmoe.config import ConfigError
from openmoe.evaluation.harness import Adapter, register
from openmoe.inference import chat
from openmoe.inference.decode import Sampling
from openmoe.inference.model import Score
from tests.inference import case


@dataclasses.dataclass
class Request:
  args: tuple


class Hook:
  """In place of the harness's cache of results."""

  def __init__(self):
    self.seen = []

  def add_partial(self, *entry):
    self.seen.append(entry)


@pytest.fixture(scope='module')
def adapter() -> Adapter:
  adapter = Adapter(model=case.model('openmoe'))
  adapter.cache_hook = Hook()
  return adapter


def test_a_continuation_starts_where_its_context_ends(adapter):
  assert adapter._pair('abc', 'de') == ([37, 38, 39], [40, 41])
  assert adapter._pair('', 'de') == ([], [40, 41])
  # A space belongs to the word behind it; its id here would be negative.
  assert adapter._pair('ab\x7f', 'd') == ([37, 38, 67], [40])
  long = adapter._pair('a' * 80, 'bb')
  assert (len(long[0]), len(long[1])) == (61, 2)  # and the token that begins a sequence


def test_likelihoods_are_those_of_the_model(adapter):
  (found,) = adapter.loglikelihood([Request(('abc', 'de'))])
  (score,) = adapter.model.score([([37, 38, 39], [40, 41])])
  assert found == (score.log_prob, score.is_greedy)
  assert adapter.cache_hook.seen[-1] == ('loglikelihood', ('abc', 'de'), found)


def test_rolling_windows_judge_every_token_once(adapter, monkeypatch):
  windows = []
  score = lambda requests: (
    windows.extend(requests) or [Score(-1.0 * len(c), (-1.0,) * len(c), True) for _, c in requests]
  )
  monkeypatch.setattr(adapter.model, 'score', score)
  text = ''.join(chr(60 + i % 60) for i in range(150))
  assert adapter.loglikelihood_rolling([Request((text,)), Request(('ab',))]) == [-150.0, -2.0]
  ids = adapter._encode(text)
  judged = [token for _, continuation in windows[:-1] for token in continuation]
  assert judged == ids
  assert all(1 + len(context) + len(new) <= 64 for context, new in windows)
  assert all(len(context) >= 1 for context, _ in windows[1:-1])
  # The last window is full: as much before its tokens as fits.
  assert 1 + sum(map(len, windows[-2])) == 64


def test_generation_obeys_until_and_length(adapter):
  ask = lambda **options: adapter.generate_until([Request(('abc', options))])[0]
  whole = ask(max_gen_toks=6)
  assert len(whole) <= 6
  assert ask(max_gen_toks=6, until=[whole[2]]) == whole[: whole.index(whole[2])]
  assert ask(max_gen_toks=6, do_sample=True, temperature=1.0) == ask(
    max_gen_toks=6, temperature=1.0
  )


@pytest.mark.parametrize(
  ('options', 'wanted'),
  [
    ({}, Sampling()),
    ({'do_sample': True}, Sampling(1.0)),
    ({'do_sample': True, 'temperature': 0}, Sampling()),
    ({'do_sample': True, 'temperature': 0.0, 'top_p': 0.5}, Sampling()),
    ({'do_sample': False, 'temperature': 0.7}, Sampling()),
    ({'temperature': '0.7', 'top_k': 5, 'top_p': None}, Sampling(0.7, 5)),
    ({'do_sample': True, 'temperature': 0.5, 'top_p': 0}, Sampling(0.0, 0, 1e-6)),
  ],
)
def test_a_temperature_of_zero_is_greedy(adapter, options, wanted):
  assert adapter._asked(options).sampling == wanted


@pytest.mark.parametrize(
  ('options', 'said'),
  [
    ({'temperature': 'hot'}, "temperature='hot' must be a number"),
    ({'temperature': math.nan}, 'temperature=nan must be a number'),
    ({'temperature': True}, 'temperature=True must be a number'),
    ({'do_sample': 'yes'}, "do_sample='yes' must be True or False"),
    ({'do_sample': True, 'top_p': 1.5}, r'top_p in \(0, 1\]'),
    ({'do_sample': True, 'top_k': 2.5}, 'top_k=2.5 must be a whole number'),
    ({'max_gen_toks': 0}, 'max_gen_toks=0 must be a whole number, 1 or more'),
    ({'until': 3}, 'until=3 must be a text or a list of texts'),
    ({'until': ['a', None]}, 'must be a text or a list of texts'),
  ],
)
def test_options_of_other_types_are_refused(adapter, options, said):
  with pytest.raises(ConfigError, match=said):
    adapter._asked(options)


def test_the_length_of_an_answer_has_several_names(adapter):
  assert adapter._asked({}).max_new_tokens == 256
  assert adapter._asked({'max_completion_tokens': 7}).max_new_tokens == 7
  assert adapter._asked({'max_new_tokens': 5, 'max_tokens': 6}).max_new_tokens == 5


def test_what_melts_into_its_context_is_not_certain(adapter, monkeypatch):
  ids = lambda text: [40] * (len(text) // 2) + [50] * (len(text) % 2)  # two letters, one token
  monkeypatch.setattr(adapter, '_encode', ids)
  assert adapter._pair('a', 'b') == ([], [40])
  assert adapter._pair('aab', 'b') == ([40], [40])
  with pytest.raises(ConfigError, match="continuation '' of 'aa' has no tokens"):
    adapter._pair('aa', '')


def test_numbers_that_are_none_are_no_results(adapter, monkeypatch):
  broken = lambda requests: [Score(math.nan, (), False) for _ in requests]
  monkeypatch.setattr(adapter.model, 'score', broken)
  ranked, whole = adapter.loglikelihood, adapter.loglikelihood_rolling
  for ask, arguments in ((ranked, ('a', 'b')), (whole, ('a',))):
    with pytest.raises(ConfigError, match='log-probability nan: its weights'):
      ask([Request(arguments)])


def test_chat_templates_give_text():
  messages = [{'role': 'system', 'content': 'S'}, {'role': 'user', 'content': 'Q'}]
  assert chat.OPENMOE.text(messages) == '<<SYS>>\nS\n<</SYS>>\n\n<s>[INST] Q [/INST]'
  answered = [*messages, {'role': 'assistant', 'content': 'A'}, {'role': 'user', 'content': 'R'}]
  assert chat.OPENMOE.text(answered).endswith('[/INST] A </s><s>[INST] R [/INST]')
  text = chat.JETMOE.text(messages)
  assert text == '<|system|>\nS</s>\n<|user|>\nQ</s>\n<|assistant|>\n'
  ids = chat.JETMOE.encode(text, lambda piece: [ord(c) for c in piece], eos_id=2)
  assert ids.count(2) == 2 and ord('<') in ids
  with pytest.raises(ConfigError, match="Roles \\['robot'\\]"):
    chat.OPENMOE.text([{'role': 'robot', 'content': ''}])


def test_an_unfinished_answer_is_continued(adapter):
  messages = [{'role': 'user', 'content': 'Q'}, {'role': 'assistant', 'content': 'A is'}]
  assert adapter.apply_chat_template(messages, add_generation_prompt=False).endswith(' A is')
  assert Adapter(model=adapter.model).chat_template(True) == 'openmoe'
  adapter._chats = False


def test_a_template_that_changes_what_is_to_be_continued_is_refused(adapter, monkeypatch):
  louder = chat.ChatTemplate('louder', lambda messages, _: messages[-1]['content'].upper())
  monkeypatch.setattr(adapter.model, 'chat_template', louder)
  messages = [{'role': 'user', 'content': 'Q'}, {'role': 'assistant', 'content': 'A is'}]
  with pytest.raises(ConfigError, match="louder changes the message 'A is'"):
    adapter.apply_chat_template(messages, add_generation_prompt=False)
  adapter._chats = False


def test_the_harness_runs_a_task_file(tmp_path):
  """arc_easy as it ships, on rows that lie on disk."""
  lm_eval = pytest.importorskip('lm_eval')
  rows = [
    {
      'question': 'Which?' + 'x' * i,
      'choices': {'text': ['one', 'two', 'six'], 'label': ['A', 'B', 'C']},
      'answerKey': 'ABC'[i % 3],
    }
    for i in range(6)
  ]
  data = tmp_path / 'rows.jsonl'
  data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  task = {
    'include': str(pathlib.Path(lm_eval.__file__).parent / 'tasks/arc/arc_easy.yaml'),
    'task': 'arc_easy_local',
    'dataset_path': 'json',
    'dataset_name': None,
    'dataset_kwargs': {
      'data_files': {split: str(data) for split in ('train', 'validation', 'test')},
      'cache_dir': str(tmp_path),
    },
  }
  (tmp_path / 'arc_easy_local.yaml').write_text(json.dumps(task))  # JSON is YAML too
  from lm_eval.tasks import TaskManager

  from convert.open import load

  model = register(load)(model=_texts())
  results = lm_eval.simple_evaluate(
    model=model,
    tasks=['arc_easy_local'],
    task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    num_fewshot=0,
    bootstrap_iters=0,
    log_samples=True,
  )
  (name,) = results['results']
  figures, samples = results['results'][name], results['samples'][name]
  assert len(samples) == 6 and 0 <= figures['acc,none'] <= 1
  for sample in samples:
    log_probs = [response[0] for response in sample['filtered_resps']]
    assert all(math.isfinite(p) and p < 0 for p in log_probs)
    best = max(range(3), key=log_probs.__getitem__)
    assert sample['acc'] == float('ABC'[best] == sample['doc']['answerKey'])


def _texts():
  """A model whose vocabulary takes any text."""
  model = case.model('openmoe', max_length=96)
  model.vocabulary = type('Any', (case.Numbers,), {'encode': lambda self, t: [
    2 + ord(c) % 60 for c in t
  ]})()  # fmt: skip
  return model
