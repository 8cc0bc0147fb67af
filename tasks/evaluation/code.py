"""HumanEval and MBPP: programs that a model writes, run in a sandbox against their tests.

HumanEval is 0-shot, MBPP 3-shot, as JetMoE's page states; pass@1, and pass@k with more samples.
`reference` HumanEval has OpenMoE's instruction before the code.

Columns: humaneval task_id, prompt, test, entry_point; mbpp task_id, text (or prompt), code,
test_list, and test_setup_code if any.
"""

from __future__ import annotations

import textwrap

from openmoe.config import ConfigError
from openmoe.evaluation.items import EvaluationTask, Item, Prediction, Prompt
from tasks.evaluation import fields, programs, sandbox, splits
from tasks.evaluation.build import REFERENCE
from tasks.records import Record

# What ends a function that stands at the left margin.
_HUMANEVAL_STOP = ('\nclass ', '\ndef ', '\n#', '\nif __name__', '\nprint(', '\n```', '\n@')
_MBPP_SHOTS = (2, 3, 4)  # task_ids of the three solved examples of the benchmark's paper


def _pass_rates(item: Item, prediction: Prediction, written: list[str]) -> dict[str, float]:
  """pass@1 and pass@k of every power of ten up to the number of samples."""
  tests, names = '\n'.join([item.extra['setup'], *item.extra['tests']]), item.extra['names']
  passed = sum(sandbox.run(program, tests=tests, names=names).passed for program in written)
  samples = len(prediction.texts)
  ks = [k for k in (1, 10, 100) if k <= samples]
  return {f'pass@{k}': sandbox.pass_at_k(samples, passed, k) for k in ks}


def _check_samples(samples: int, temperature: float) -> None:
  if samples > 1 and temperature == 0:
    raise ConfigError(
      f'samples={samples} at temperature 0 are all the same; set TEMPERATURE (0.2 for pass@1, 0.8 '
      'for pass@100 are usual), or samples=1.'
    )


def _body(text: str, prompt: str, name: str) -> str:
  """The continuation of a prompt in a text: what is in a fence at its beginning, or all of it."""
  if not text.lstrip().startswith(('```', '~~~')):
    return text
  code = programs.program(text.lstrip(), {name})
  if f'def {name}' not in code and not code[:1].isspace():
    # The body alone, written at the margin: as deep as the prompt's last line.
    last = prompt.rstrip().rpartition('\n')[2]
    code = textwrap.indent(code, last[: len(last) - len(last.lstrip())])
  return f'\n{code}'


def humaneval(
  mode: str, shots: int | None, data_dir: str, samples: int = 1, temperature: float = 0.0
) -> EvaluationTask:
  """pass@k of functions completed from signature and docstring."""
  del shots
  sandbox.check_available()
  _check_samples(samples, temperature)
  head = ''
  if mode == REFERENCE:
    head = 'Complete the following Python code without any tests or explanation\n'

  def items() -> list[Item]:
    found = []
    for record in splits.read(data_dir, 'humaneval', 'test'):
      prompt, test, entry_point, name = (
        fields.text(record, n, empty=False) for n in ('prompt', 'test', 'entry_point', 'task_id')
      )
      if not entry_point.isidentifier() or 'check' not in test:
        raise fields.refuse(
          record, f"'test' must define check() and 'entry_point' be a name, not {entry_point!r}."
        )
      extra = {
        'before': prompt,
        # What else a prompt defines is the tests' own, whatever the program makes of it.
        'setup': programs.without(prompt, entry_point),
        'tests': [test, f'check({entry_point})'],
        'names': (entry_point,),
      }
      found.append(Item(name, Prompt(prompt, prefix=head), extra=extra))
    return found

  def measure(item: Item, prediction: Prediction) -> dict[str, float]:
    texts = [text.split('<extra_id_0> ')[-1] for text in prediction.texts]
    if mode != REFERENCE:
      texts = [_body(text, item.extra['before'], *item.extra['names']) for text in texts]
    written = [item.extra['before'] + text for text in texts]
    return _pass_rates(item, prediction, written)

  return EvaluationTask(
    'humaneval',
    'humaneval',
    items,
    'pass@1',
    measure,
    max_new_tokens=384,
    stop=_HUMANEVAL_STOP,
    samples=samples,
    temperature=temperature,
  )


def _mbpp_tests(record: Record) -> list[str]:
  """Its assertions; without any, every program would pass."""
  return fields.texts(record, fields.get(record, 'test_list'), 'test_list', least=1)


def _mbpp_question(record: Record) -> str:
  tests = '\n'.join(_mbpp_tests(record))
  return (
    'You are an expert Python programmer, and here is your task: '
    f'{fields.text(record, "text", "prompt", empty=False)} '
    f'Your code should pass these tests:\n\n{tests}\n[BEGIN]\n'
  )


def _mbpp_number(record: Record) -> int:
  number = fields.whole(fields.get(record, 'task_id'))
  if number is None:
    raise fields.refuse(record, f"'task_id' is {fields.shown(record['task_id'])}, not a number.")
  return number


def _mbpp_setup(record: Record) -> str:
  """What stands before the tests; None and an empty text are the same as no column."""
  setup = record.get('test_setup_code')
  if setup:
    return fields.as_text(record, 'test_setup_code', setup)
  imports = record.get('test_imports')
  return '\n'.join(fields.texts(record, imports, 'test_imports', least=0)) if imports else ''


def mbpp(
  mode: str, shots: int | None, data_dir: str, samples: int = 1, temperature: float = 0.0
) -> EvaluationTask:
  """pass@k of programs written from a sentence and three tests; both modes are the same."""
  del mode
  sandbox.check_available()
  _check_samples(samples, temperature)
  shots = 3 if shots is None else shots
  if shots > len(_MBPP_SHOTS):
    raise ConfigError(f'shots={shots}: mbpp has {len(_MBPP_SHOTS)} solved examples; ask for fewer.')

  def items() -> list[Item]:
    solved = {}
    for record in splits.read(data_dir, 'mbpp', 'prompt') if shots else []:
      code = fields.text(record, 'code', empty=False).replace('\r', '')
      solved[_mbpp_number(record)] = f'{_mbpp_question(record)}{code}\n[DONE]\n'
    if shots and not set(_MBPP_SHOTS) <= set(solved):
      raise ConfigError(f'mbpp: the prompt split lacks the tasks {_MBPP_SHOTS}; copy it whole.')
    chosen = tuple(solved[i] for i in _MBPP_SHOTS[:shots])
    found = []
    for record in splits.read(data_dir, 'mbpp', 'test'):
      tests = _mbpp_tests(record)
      reference = fields.text(record, 'code').replace('\r', '') if record.get('code') else ''
      extra = {
        'setup': _mbpp_setup(record),
        'tests': tests,
        'names': tuple(programs.defined(reference)),
      }
      prompt = Prompt(_mbpp_question(record), chosen, separator='\n')
      found.append(Item(str(_mbpp_number(record)), prompt, extra=extra))
    return found

  def measure(item: Item, prediction: Prediction) -> dict[str, float]:
    names = programs.called('\n'.join(item.extra['tests']))
    # The setup was made for one text of all: functions may use what it imports.
    after = f'\n{programs.imports(item.extra["setup"])}'
    written = [programs.program(text, names) + after for text in prediction.texts]
    return _pass_rates(item, prediction, written)

  return EvaluationTask(
    'mbpp',
    'mbpp',
    items,
    'pass@1',
    measure,
    max_new_tokens=256,
    stop=('[DONE]',),
    samples=samples,
    temperature=temperature,
    shots=shots,
  )
