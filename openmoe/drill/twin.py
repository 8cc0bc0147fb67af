"""A tiny twin of a configured run: the same in kind, small enough to train in seconds.

What decides which code runs stays: architecture, sparse pattern, routing, dispatch, capacity,
objective, stages, mixtures, mesh axes, optimizer and the shape of its schedule. What only costs
time shrinks: sizes, experts, lengths, rows and steps. Its batches are those of no mesh in
particular, so the same twin trains on other meshes and numbers of processes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from openmoe.config import DataConfig, MeshConfig, ModelConfig, OptimizerConfig, Schedule
from openmoe.programme import Programme, Stage, as_programme

STEPS = 24
_EMBED, _MLP, _HEADS, _HEAD = 32, 64, 4, 16
_LENGTH = 64  # tokens of a feature
_ROWS, _SHARDS = 16, 4
_EXPERTS = 8


def tiny(arguments: Mapping[str, Any], steps: int = STEPS) -> dict[str, Any]:
  """The arguments of train() of the tiny twin of a run.

  Args:
    arguments: of openmoe.train.train.
    steps: that the twin trains at most; its stages share them equally.
  """
  run, mesh = arguments['run'], arguments.get('mesh') or MeshConfig()
  programme = as_programme(arguments['data'], run.total_steps)
  whole = programme.total_steps
  each = max(1, min(steps, run.total_steps) // len(programme.stages))
  rows = _ROWS * run.num_microbatches
  stages = tuple(_stage(s, each, rows) for s in programme.stages)
  total = each * len(stages)
  lengths = {stage.data.row_length for stage in stages}
  eval_data = arguments.get('eval_data')
  if eval_data is not None:
    eval_data = _data(eval_data, rows)
    lengths.add(eval_data.row_length)
  small = {
    'run': dataclasses.replace(
      run,
      total_steps=total,
      relative_steps=None,
      eval_period=max(1, total // 3) if run.eval_period else 0,
      eval_steps=min(run.eval_steps, 2),
      checkpoint_period=max(1, total // 8),
      keep_checkpoints=3,
      log_period=1,
      router_period=1,
      initial_checkpoint=None,
      record_batches=True,
      sample_prompts=(),
    ),
    'model': _model(arguments['model'], mesh, math.gcd(*lengths)),
    'optimizer': _optimizer(arguments['optimizer'], total / whole),
    'data': Programme(stages) if isinstance(arguments['data'], Programme) else stages[0].data,
    'eval_data': eval_data,
    'mesh': mesh,
  }
  return dict(arguments) | small


def _model(model: ModelConfig, mesh: MeshConfig, group_size: int) -> ModelConfig:
  """Two repeats of the sparse pattern, or two dense layers, that the mesh can split."""
  groups = min(2, model.num_sparse_layers or model.num_layers)
  parts, split = mesh.num_expert_partitions, mesh.num_model_partitions
  moe = model.moe
  if moe is not None:
    least = min(moe.num_experts, max(_EXPERTS, moe.top_k))
    moe = dataclasses.replace(moe, num_experts=math.lcm(least, parts), group_size=group_size)
  return dataclasses.replace(
    model,
    name=f'{model.name}_tiny_twin',
    num_layers=groups * model.sparse_period,
    num_sparse_layers=groups if model.num_sparse_layers else 0,
    embed_dim=math.lcm(_EMBED, split),
    mlp_dim=math.lcm(_MLP, split),
    num_heads=math.lcm(_HEADS, split),
    head_dim=_HEAD,
    moe=moe,
  )


def _optimizer(optimizer: OptimizerConfig, share: float) -> OptimizerConfig:
  """The schedule over a share of its steps; its rates stay the same at the same place."""
  shorter = lambda steps: max(1, round(steps * share)) if steps else 0
  warmup, rate = shorter(optimizer.warmup_steps), optimizer.learning_rate
  if optimizer.schedule is Schedule.RSQRT:
    rate *= math.sqrt(warmup / optimizer.warmup_steps)
  return dataclasses.replace(
    optimizer,
    learning_rate=rate,
    warmup_steps=warmup,
    decay_steps=shorter(optimizer.decay_steps),
    # Matrices that are factored in the run are so in its twin.
    min_dim_size_to_factor=min(optimizer.min_dim_size_to_factor, _HEAD),
  )


def _data(data: DataConfig, rows: int) -> DataConfig:
  shards = 1 if data.num_shards == 1 else _SHARDS
  lengths = {name: min(n, _LENGTH) for name, n in data.task_feature_lengths.items()}
  return dataclasses.replace(data, batch_size=rows, num_shards=shards, task_feature_lengths=lengths)


def _stage(stage: Stage, steps: int, rows: int) -> Stage:
  data = _data(stage.data, rows)
  optimizer = stage.optimizer and _optimizer(stage.optimizer, steps / max(stage.steps, 1))
  return Stage(stage.name, steps * data.batch_size * data.row_length, data, optimizer)


def fitting(mesh: MeshConfig, devices: int) -> MeshConfig:
  """The mesh where so many devices can form it; else one with the same axes split in two."""
  parts, split = mesh.num_expert_partitions, mesh.num_model_partitions
  if devices % (parts * split) == 0:
    return mesh
  halved = lambda size, left: 2 if size > 1 and left % 2 == 0 else 1
  parts = halved(parts, devices)
  split = halved(split, devices // parts)
  return dataclasses.replace(mesh, num_expert_partitions=parts, num_model_partitions=split)
