"""From a configuration of t5x to gin bindings of ours, and what could not be placed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from convert.core.tensors import ConvertError
from convert.t5x_gin import places
from convert.t5x_gin.configuration import REQUIRED, Bound, Configuration
from convert.t5x_gin.parse import Macro, Reference

_EXTRA_MLP = 'flaxformer.architectures.moe.moe_architecture.SparseDecoderLayer.extra_mlp'
_SHARDS = 8  # gin/runs/pretrain.gin's DATA_SHARDS, which must divide the batch


@dataclasses.dataclass(frozen=True)
class Translation:
  """What a run of t5x is here.

  Attributes:
    script: 'train' or 'evaluate'.
    name: of the model: that of the file.
    values: by name of a macro or field of ours.
    unplaced: one phrase for each binding that has no place here.
  """

  script: str
  name: str
  values: dict[str, Any]
  unplaced: list[str]

  @property
  def is_sparse(self) -> bool:
    return 'config.MoEConfig.num_experts' in self.values


def translate(found: Configuration, name: str) -> Translation:
  """What a configuration says, in our names.

  Args:
    name: of the model that results.

  Raises:
    ConvertError: it binds neither t5x's train nor its evaluate.
  """
  script = next((s for s, root in places.ROOTS.items() if found.has(root)), None)
  if script is None:
    raise ConvertError(
      'These gin files bind neither train of t5x/train.py nor evaluate of t5x/eval.py, so they are '
      'no run; give the file of a run, which includes its model.'
    )
  work = _Work(script)
  for bound in found.reached(places.ROOTS[script]):
    work.place(bound)
  work.finish()
  unread = [f'{text}: nothing reads this macro, so it says nothing' for text in found.unread()]
  return Translation(script, name, work.values, [*work.unplaced, *unread])


class _Work:
  def __init__(self, script: str):
    self.values: dict[str, Any] = {}
    self.unplaced: list[str] = []
    self._has_extra_mlp = False
    own = places.TRAIN_PLACES if script == 'train' else places.EVALUATE_PLACES
    self._places = places.MODEL_PLACES | own
    self._silent = places.SILENT
    if script == 'evaluate':
      self._silent = self._silent | places.SILENT_IN_EVALUATION

  def _refuse(self, bound: Bound, why: str) -> None:
    self.unplaced.append(f'{bound} ({bound.where}): {why}')

  def place(self, bound: Bound) -> None:
    name = places.short(bound.name)
    scoped = f'{bound.scope.rpartition("/")[2]}/{name}' if bound.scope else name
    self._has_extra_mlp |= bound.name == _EXTRA_MLP and bound.value is not None
    for key in (scoped, name):
      if key in self._places:
        self._put(self._places[key], bound)
      elif key in places.FIXED and key not in self._silent:
        self._compare(places.FIXED[key], bound)
      elif key not in self._silent:
        continue
      return
    others = list(_references(bound.value))
    if not others or any(places.short(r.name) not in places.PARTS for r in others):
      self._refuse(bound, 'there is no counterpart')

  def _compare(self, allowed: tuple, bound: Bound) -> None:
    value = str(bound.value) if isinstance(bound.value, Macro) else bound.value
    same = lambda one: value == one and isinstance(value, bool) is isinstance(one, bool)
    if not any(map(same, allowed)):
      self._refuse(bound, f'here it is always {allowed[0]!r}')

  def _put(self, place: str, bound: Bound) -> None:
    value = bound.value
    if value == REQUIRED:
      return
    if isinstance(value, Macro | Reference) or list(_references(value)):
      value = _Refused(f'{place} takes a value, not a reference')
    elif place in _VALUES:
      value = _VALUES[place](value)
    if isinstance(value, _Refused):
      self._refuse(bound, value.why)
    elif value is not None:  # None is t5x's own default, and ours
      other = self.values.setdefault(place, value)
      if other != value:
        self._refuse(bound, f'{place} is one value here, and another binding says {other!r}')

  def finish(self) -> None:
    """What follows from several bindings together."""
    values = self.values
    if 'config.MoEConfig.num_experts' in values and not self._has_extra_mlp:
      self.unplaced.append(f'{places.short(_EXTRA_MLP)} is not bound: here sparse blocks have it')
    if values.get('config.OptimizerConfig.schedule') == 'constant':
      # t5x's own schedule does not read it there either.
      values.pop('config.OptimizerConfig.warmup_steps', None)
    for ours, macro in (
      ('mixture_or_task_name', 'MIXTURE_OR_TASK_NAME'),
      ('task_feature_lengths', 'TASK_FEATURE_LENGTHS'),
    ):
      if values.get(f'eval/config.DataConfig.{ours}') == values.get(macro):
        values.pop(f'eval/config.DataConfig.{ours}', None)
    if values.get('EVAL_BATCH_SIZE') == values.get('BATCH_SIZE'):
      values.pop('EVAL_BATCH_SIZE', None)
    if isinstance(batch := values.get('BATCH_SIZE'), int) and batch % _SHARDS:
      values['DATA_SHARDS'] = math.gcd(batch, _SHARDS)


@dataclasses.dataclass(frozen=True)
class _Refused:
  why: str


def _schedule(value: Any) -> Any:
  known = list(places.SCHEDULES)
  if value in known:
    return places.SCHEDULES[value]
  return _Refused(f'of t5x, {known} have counterparts; set config.OptimizerConfig by hand')


def _tasks(value: Any) -> Any:
  if value in places.EVALUATIONS:
    return (places.EVALUATIONS[value],)
  return _Refused(f'of the evaluations, {sorted(places.EVALUATIONS)} have counterparts')


def _checkpoint(value: Any) -> Any:
  if isinstance(value, list | tuple):
    if len(value) > 1:
      return _Refused('a run starts from one checkpoint here')
    value = value[0] if value else None
  return value


_VALUES = {
  'config.OptimizerConfig.schedule': _schedule,
  'TASKS': _tasks,
  'INITIAL_CHECKPOINT': _checkpoint,
  'CHECKPOINT': _checkpoint,
}


def _references(value: Any) -> Iterator[Reference]:
  if isinstance(value, Reference):
    yield value
  elif isinstance(value, list | tuple):
    for part in value:
      yield from _references(part)


def as_gin(told: Translation, sources: str) -> str:
  """A gin file to be given after gin/runs/pretrain.gin (or with gin/runs/eval.gin).

  Args:
    sources: the files that were read, for its first line.
  """
  lines = [f'# {sources} of t5x, in the names of this project.']
  values = dict(told.values)
  if told.script == 'train':
    lines += ['# Command: python -m scripts.train --gin_file=gin/runs/pretrain.gin --gin_file=THIS']
  else:
    lines += ['# Command: python -m scripts.evaluate --gin_file=gin/runs/eval.gin --gin_file=THIS']
    # A checkpoint says itself which model it is.
    values = {name: value for name, value in values.items() if name.isupper()}
  lines += ['from __gin__ import dynamic_registration', '']
  if told.script == 'train':
    lines += _imports(values)
  macros = {name: value for name, value in values.items() if name.isupper()}
  lines += [f'{name} = {value!r}' for name, value in sorted(macros.items())]
  if told.script == 'train':
    dropout = values.pop('config.ModelConfig.dropout_rate', 0.0)
    lines += [f'DROPOUT_RATE = {dropout!r}', '']
    values |= {'config.ModelConfig.name': told.name}
    values |= {'config.ModelConfig.dropout_rate': '%DROPOUT_RATE'}
    if told.is_sparse:
      values |= {'config.ModelConfig.moe': '@config.MoEConfig()'}
  blocks: dict[str, list[str]] = {}
  for name, value in values.items():
    owner, dot, field = name.rpartition('.')
    if dot:
      reference = isinstance(value, str) and value[:1] in ('%', '@')
      blocks.setdefault(owner, []).append(f'  {field} = {value if reference else repr(value)}')
  for owner, fields in blocks.items():
    lines += [f'{owner}:', *sorted(fields), '']
  if told.unplaced:
    lines += ['# Could not be placed:', *(f'#   {_one_line(text)}' for text in told.unplaced)]
  return '\n'.join(lines).rstrip() + '\n'


def _one_line(text: str) -> str:
  return ' '.join(text.split())


def _imports(values: dict[str, Any]) -> list[str]:
  """Imports, with what registers the mixture and tells its vocabulary."""
  lines = []
  if 'VOCABULARY' in values:
    lines += ["include 'gin/mixtures/umt5.gin'", '']
  lines += ['from openmoe import config']
  mixture = str(values.get('MIXTURE_OR_TASK_NAME', ''))
  module = next((m for start, m in places.MODULES.items() if mixture.startswith(start)), None)
  if module:
    lines += [f'from tasks import {module}']
  elif mixture:
    lines += [f'# Import the module of tasks/ that registers {mixture!r} here.']
  return [*lines, '']
