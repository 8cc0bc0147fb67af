"""What training writes down in a checkpoint, and compares when it goes on from one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from openmoe.checkpoint import description
from openmoe.config import ConfigError, Dispatch, ModelConfig, OptimizerConfig, TrainConfig
from openmoe.data import exclusion
from openmoe.data.fingerprint import changed_files, data_files
from openmoe.data.vocabulary import vocabulary_file
from openmoe.programme import Programme

# What may change while a run goes on, as the same weights still compute the same: how it is
# computed, and what only training or a new run sees. All other fields are the model.
_FREE = {
  *('remat', 'vocab_block', 'dtype', 'float32_attention', 'dropout_rate', 'init_scale', 'init_std'),
  *('moe.load_balance_weight', 'moe.router_z_weight', 'moe.router_loss', 'moe.jitter_noise'),
  *('moe.router_init_std', 'moe.dispatch', 'moe.balance_loss', 'logit_z_weight'),
}


class RunMetadata:
  """What a run's checkpoints say: of the run for people, and their description for programs.

  Args:
    run, model, optimizer, programme: as train() has them.

  Raises:
    ConfigError: the vocabulary's file is not there.
  """

  def __init__(
    self, run: TrainConfig, model: ModelConfig, optimizer: OptimizerConfig, programme: Programme
  ):
    self._run, self._model, self._programme = run, model, programme
    self._file = vocabulary_file(programme.stages[-1].data.mixture_or_task_name)
    self._whole = description.Description(
      model,
      vocabulary=description.vocabulary_record(*self._file) if self._file else None,
      optimizer=description.optimizer_record(optimizer),
    )
    self._files: dict[str, dict[str, str]] = {}  # by stage
    self._validated: tuple[int, dict[str, float]] = (-1, {})
    self.tokens_more = 0  # seen beyond what the programme says, with another batch size

  def keep_vocabulary(self) -> None:
    """Puts the vocabulary's file into the run directory; for one process."""
    if self._file:
      description.keep_vocabulary(self._run.model_dir, self._whole.vocabulary, self._file.content)

  def go_on(self, step: int, tokens_seen: object) -> None:
    """Counts tokens on from those that a checkpoint of `step` says it has seen."""
    if isinstance(tokens_seen, int) and not isinstance(tokens_seen, bool) and tokens_seen >= 0:
      self.tokens_more = tokens_seen - self._programme.tokens_before(step)

  def validated(self, step: int, found: Mapping[str, float]) -> None:
    """Notes what an evaluation of the state after `step` has found."""
    self._validated = step, dict(found)

  def tokens_seen(self, step: int) -> int:
    """Positions trained on before `step`, in this start and all before it."""
    return self._programme.tokens_before(step) + self.tokens_more

  def __call__(self, step: int) -> dict[str, Any]:
    """The metadata of the checkpoint of a step, JSON-able."""
    programme = self._programme
    stage = programme.stages[programme.at(min(max(step, 1), programme.total_steps) - 1)[0]]
    data = stage.data
    if stage.name not in self._files:
      self._files[stage.name] = data_files(data)
    described = dataclasses.replace(
      self._whole,
      row_length=data.row_length,
      objective='prefix' if 'inputs' in data.task_feature_lengths else 'causal',
      tokens_seen=self.tokens_seen(step),
    )
    more = {'excluded': exclusion.load(data.exclude).plain()} if data.exclude else {}
    if self._validated[0] == step:
      more['validation'] = self._validated[1]
    return more | {
      'tokens_seen': self.tokens_seen(step),
      'stage': stage.name,
      'mixture': data.mixture_or_task_name,
      'task_feature_lengths': dict(data.task_feature_lengths),
      'data_seed': data.seed,
      'data_files': self._files[stage.name],
      'seed': self._run.seed,
      description.KEY: described.plain(),
      'saved_at': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
    }

  def check_model(self, saved: description.Description | None, step: int) -> list[str]:
    """What differs from the model that a checkpoint of this run says it is of, and may.

    Args:
      saved: its description; None for one of before there were any.

    Raises:
      ConfigError: it is another model, or of another vocabulary.
    """
    if saved is None:
      return []
    fields = description.model_fields
    before, now = fields(saved.model), fields(self._model)
    phrases = description.identity_differences(before, now)
    # A bias of the router is part of the function.
    free = [p for p in phrases if p.partition(' is ')[0] in _FREE and "'loss_free'" not in p]
    wrong = [p for p in phrases if p not in free]
    if _dropless(saved.model) != _dropless(self._model):
      wrong = phrases
    if wrong:
      raise ConfigError(
        f'checkpoint_{step} is of another model: {"; ".join(wrong)}. A run directory holds one '
        'model: use the former configuration; or another MODEL_DIR, with INITIAL_CHECKPOINT to '
        'begin it from these weights.'
      )
    self._check_vocabulary(saved.vocabulary, step)
    return free

  def _check_vocabulary(self, saved: description.VocabularyRecord | None, step: int) -> None:
    now = self._whole.vocabulary
    content = lambda record: (record.kind, record.digest, record.extra_ids)
    if saved is None or now is None or content(saved) == content(now):
      return
    told = lambda r: f'{r.kind} {r.digest[:16] or "-"} with {r.extra_ids} extra ids'
    raise ConfigError(
      f'checkpoint_{step} was trained on tokens of another vocabulary: {told(saved)} there, '
      f'{told(now)} here ({now.path}). Its own is kept in the run directory as {saved.file_name}; '
      'put it back, or use another MODEL_DIR.'
    )


def _dropless(model: ModelConfig) -> bool:
  return model.moe is not None and model.moe.dispatch is Dispatch.DROPLESS


def data_changed(run: TrainConfig, now: dict, metadata: Mapping[str, Any], step: int) -> bool:
  """Whether the checkpoint was made on other data, from which this run may go on.

  Raises:
    ConfigError: other data, and run.allow_data_change is off.
  """
  names = [n for n in ('mixture', 'task_feature_lengths') if metadata.get(n) != now[n]]
  changes = [f'{n} is {metadata.get(n)} there and {now[n]} here' for n in names]
  files = metadata.get('data_files')
  if not changes and isinstance(files, dict):
    changes = changed_files({str(k): str(v) for k, v in files.items()}, now['data_files'])
  if changes and not run.allow_data_change:
    more = f' and {len(changes) - 4} more' if len(changes) > 4 else ''
    raise ConfigError(
      f'checkpoint_{step} was trained on other data: {"; ".join(changes[:4])}{more}. To go on with '
      f'the new data from its beginning set ALLOW_DATA_CHANGE = True; or use another MODEL_DIR.'
    )
  return bool(changes)
