"""HumanEval and MBPP: programs that a model writes, run in a sandbox against their tests.

HumanEval is 0-shot, MBPP 3-shot, as JetMoE's page states; pass@1, and pass@k with more samples.
`reference` HumanEval has OpenMoE's instruction before the code.

Columns: humaneval task_id, prompt, test, entry_point; mbpp task_id, text (or prompt), code,
test_list, and test_setup_code if any.
"""

from __future__ import annotations

import re

from openmoe.config import ConfigError
from openmoe.evaluation.items import EvaluationTask, Item, Prediction, Prompt
from tasks.evaluation import records, sandbox
from tasks.evaluation.build import REFERENCE
from tasks.evaluation.records import Record, field

# What ends a function that stands at the left margin.
_HUMANEVAL_STOP = ('\nclass ', '\ndef ', '\n#', '\nif __name__', '\nprint(', '\n```', '\n@')
_MBPP_SHOTS = (2, 3, 4)  # task_ids of the three solved examples of the benchmark's paper


def _pass_rates(item: Item, prediction: Prediction, programs: list[str]) -> dict[str, float]:
  """pass@1 and pass@k of every power of ten up to the number of samples."""
  passed = sum(sandbox.run(program).passed for program in programs)
  samples = len(prediction.texts)
  ks = [k for k in (1, 10, 100) if k <= samples]
  return {f'pass@{k}': sandbox.pass_at_k(samples, passed, k) for k in ks}


def _check_samples(samples: int, temperature: float) -> None:
  if samples > 1 and temperature == 0:
    raise ConfigError(
      f'samples={samples} at temperature 0 are all the same; set TEMPERATURE (0.2 for pass@1, 0.8 '
      'for pass@100 are usual), or samples=1.'
    )


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
    for record in records.read(data_dir, 'humaneval', 'test'):
      get = lambda name, record=record: field(record, name, 'humaneval')
      after = f'\n{get("test")}\ncheck({get("entry_point")})\n'
      extra = {'before': get('prompt'), 'after': after}
      found.append(Item(str(get('task_id')), Prompt(get('prompt'), prefix=head), extra=extra))
    return found

  def measure(item: Item, prediction: Prediction) -> dict[str, float]:
    texts = [text.split('<extra_id_0> ')[-1] for text in prediction.texts]
    programs = [item.extra['before'] + text + item.extra['after'] for text in texts]
    return _pass_rates(item, prediction, programs)

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


def _mbpp_question(record: Record) -> str:
  name = 'text' if 'text' in record else 'prompt'
  tests = '\n'.join(field(record, 'test_list', 'mbpp'))
  return (
    f'You are an expert Python programmer, and here is your task: {field(record, name, "mbpp")} '
    f'Your code should pass these tests:\n\n{tests}\n[BEGIN]\n'
  )


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
    for record in records.read(data_dir, 'mbpp', 'prompt') if shots else []:
      code = field(record, 'code', 'mbpp').replace('\r', '')
      solved[int(record['task_id'])] = f'{_mbpp_question(record)}{code}\n[DONE]\n'
    if shots and not set(_MBPP_SHOTS) <= set(solved):
      raise ConfigError(f'mbpp: the prompt split lacks the tasks {_MBPP_SHOTS}; copy it whole.')
    chosen = tuple(solved[i] for i in _MBPP_SHOTS[:shots])
    found = []
    for record in records.read(data_dir, 'mbpp', 'test'):
      setup = record.get('test_setup_code') or '\n'.join(record.get('test_imports') or ())
      after = '\n'.join(['', setup, *field(record, 'test_list', 'mbpp'), ''])
      prompt = Prompt(_mbpp_question(record), chosen, separator='\n')
      found.append(Item(str(record['task_id']), prompt, extra={'after': after}))
    return found

  def measure(item: Item, prediction: Prediction) -> dict[str, float]:
    # Some write the code in a fence; what is between is the program.
    fenced = (re.search(r'```(?:python)?\n(.*?)```', text, re.DOTALL) for text in prediction.texts)
    found = zip(fenced, prediction.texts, strict=True)
    programs = [(m.group(1) if m else text) + item.extra['after'] for m, text in found]
    return _pass_rates(item, prediction, programs)

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
