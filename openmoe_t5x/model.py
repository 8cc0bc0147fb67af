"""Our decoders with t5x's model interface: what its trainer, evaluator and infer.py call."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import clu.metrics as clu_metrics
import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import seqio
from t5x import metrics as t5x_metrics
from t5x import models as t5x_models

from openmoe import partitioning
from openmoe.config import ConfigError, ModelConfig
from openmoe.inference import decode
from openmoe.models import build_model, empty_batch
from openmoe.models.decoding import unstack
from openmoe.train_step import loss_fn
from openmoe.types import Array, Batch, PyTree
from openmoe_t5x.names import from_t5x, params_axes, to_batch, to_t5x

# t5x's names of decoding parameters, and ours.
_DECODER = {'temperature': 'temperature', 'topk': 'top_k', 'top_k': 'top_k', 'topp': 'top_p'}


def task_vocabulary(mixture_or_task_name: str) -> seqio.Vocabulary:
  """The vocabulary of a registered task's targets."""
  return seqio.get_mixture_or_task(mixture_or_task_name).output_features['targets'].vocabulary


class OpenMoEModel(t5x_models.BaseTransformerModel):
  """An OpenMoE, OpenLLaMA or JetMoE decoder in t5x.

  Args:
    config: sizes; gin/models binds them.
    vocabulary: of the tasks.
    optimizer_def: t5x's optimizer.
    sampling: how predict_batch draws.
    init_seed: initial parameters are those of scripts.train with this SEED; None takes t5x's
      random numbers.
  """

  FEATURE_CONVERTER_CLS = seqio.DecoderFeatureConverter

  def __init__(
    self,
    config: ModelConfig,
    vocabulary: seqio.Vocabulary,
    optimizer_def: Any,
    sampling: decode.Sampling | None = None,
    init_seed: int | None = None,
  ):
    super().__init__(
      module=build_model(config),
      input_vocabulary=vocabulary,
      output_vocabulary=vocabulary,
      optimizer_def=optimizer_def,
    )
    self.config, self._seed = config, init_seed
    self._sampling = sampling or decode.Sampling()

  def get_initial_variables(
    self, rng: Array, input_shapes: Mapping[str, Any], input_types: Mapping[str, Any] | None = None
  ) -> PyTree:
    """{'params', 'params_axes'}; the shapes of a batch do not matter."""
    del input_shapes, input_types
    key = rng if self._seed is None else jax.random.key(self._seed)
    with partitioning.without_mesh():
      variables = self.module.init(key, empty_batch(1, 8), train=False)
    params = to_t5x(nn.unbox(variables['params']), self.config)
    return flax.core.freeze({'params': params, 'params_axes': params_axes(self.config)})

  def _module_for(self, batch: Batch) -> tuple[nn.Module, ModelConfig]:
    """The decoder with the largest routing group that divides the tokens of a device.

    In training that is the configured one; rows of an evaluation may be short.

    Raises:
      ConfigError: t5x's mesh is not one for experts.
    """
    config = self.config
    mesh = partitioning.current_mesh()
    if mesh is not None and set(mesh.axis_names) != set(partitioning.MESH_AXES):
      raise ConfigError(
        f'The partitioner has a mesh of {tuple(mesh.axis_names)}, and this model needs '
        f'{partitioning.MESH_AXES}: use openmoe_t5x.partitioner.OpenMoEPartitioner, or '
        "t5x.contrib.moe's."
      )
    if config.moe is not None:
      tokens = batch.targets.size // partitioning.partitions('act_batch')
      most = min(config.moe.group_size, tokens)
      size = next(n for n in range(most, 0, -1) if tokens % n == 0)
      config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, group_size=size))
    return build_model(config), config

  def loss_fn(
    self, params: PyTree, batch: Mapping[str, Array], dropout_rng: Array | None
  ) -> tuple[Array, dict[str, Any]]:
    """(loss of one (micro)batch, t5x's metrics): openmoe.train_step.loss_fn."""
    batch = to_batch(batch)
    model, config = self._module_for(batch)
    count, train = jnp.sum(batch.loss_weights), dropout_rng is not None
    ours = from_t5x(params, self.config)
    loss, aux = loss_fn(ours, batch, jnp.maximum(count, 1.0), dropout_rng, model, config, train)
    return loss, _metrics(loss, aux, count, batch)

  def _compute_logits(
    self, params: PyTree, batch: Mapping[str, Array], dropout_rng: Array | None = None
  ) -> Array:
    """float32 [b, t, v]."""
    batch = to_batch(batch)
    rngs = {} if dropout_rng is None else {'dropout': dropout_rng}
    variables = {'params': from_t5x(params, self.config)}
    model, _ = self._module_for(batch)
    return model.apply(variables, batch, train=bool(rngs), rngs=rngs).logits()

  def score_batch(
    self, params: PyTree, batch: Mapping[str, Array], return_intermediates: bool = False
  ) -> Array:
    """float32 [b]: log-likelihood of the targets, with the evaluation capacity of the original."""
    if return_intermediates:
      raise ConfigError(
        'return_intermediates has nothing to return: statistics of routers are among the metrics.'
      )
    logits_btv = self._compute_logits(params, batch)
    batch = to_batch(batch)
    chosen_bt = jnp.take_along_axis(logits_btv, batch.targets[..., None], axis=-1)[..., 0]
    log_probs_bt = chosen_bt - jax.nn.logsumexp(logits_btv, axis=-1)
    return jnp.sum(log_probs_bt * batch.loss_weights, axis=-1)

  def predict_batch_with_aux(
    self,
    params: PyTree,
    batch: Mapping[str, Array],
    rng: Array | None = None,
    *,
    return_all_decodes: bool = False,
    num_decodes: int = 1,
    decoder_params: Mapping[str, Any] | None = None,
  ) -> tuple[Array, dict[str, Array]]:
    """Continues the inputs of every row, at most to its end; nothing is dropped.

    Args:
      rng: of draws.
      return_all_decodes: all of num_decodes, the likeliest last, as t5x has them.
      decoder_params: temperature, topk and topp in place of `sampling`.

    Returns:
      Tokens int32 [b, t] (or [b, num_decodes, t]), 0 after the end; {'scores': float32 [b, ...]}.
    """
    prompt_bt = batch['decoder_input_tokens'] * batch['decoder_causal_attention']
    b, t = prompt_bt.shape
    length_b = 1 + jnp.sum(prompt_bt[:, 1:] != 0, axis=1)  # position 0 is the beginning, id 0
    key = jax.random.PRNGKey(0) if rng is None else rng
    sampling = dataclasses.replace(self._sampling, **_sampling_options(decoder_params or {}))
    state = decode.start(
      unstack(from_t5x(params, self.config), self.config),
      prompt_bt,
      length_b,
      jax.random.split(key, b * num_decodes),
      jnp.zeros(b * num_decodes, bool),
      jnp.asarray(t),
      jnp.asarray(max(sampling.temperature, 1e-6), jnp.float32),
      jnp.asarray(sampling.top_p, jnp.float32),
      config=decode.inference_config(self.config),
      samples=num_decodes,
      max_new=t,
      program=sampling.program,
      eos_ids=(self.output_vocabulary.eos_id,),
    )
    room_bW = jnp.arange(t) < t - jnp.repeat(length_b, num_decodes)[:, None] + 1
    tokens_bSW = jnp.where(room_bW, state.tokens_bW, 0).reshape(b, num_decodes, t)
    log_probs_bW = jnp.where(room_bW, state.log_probs_bW, 0.0)
    scores_bS = jnp.sum(log_probs_bW, axis=1).reshape(b, num_decodes)
    order_bS = jnp.argsort(scores_bS, axis=1)
    tokens_bSW = jnp.take_along_axis(tokens_bSW, order_bS[..., None], axis=1)
    scores_bS = jnp.take_along_axis(scores_bS, order_bS, axis=1)
    if return_all_decodes:
      return tokens_bSW, {'scores': scores_bS}
    return tokens_bSW[:, -1], {'scores': scores_bS[:, -1]}


def _sampling_options(given: Mapping[str, Any]) -> dict[str, Any]:
  """Fields of Sampling.

  Raises:
    ConfigError: a parameter is not known.
  """
  if unknown := set(given) - set(_DECODER):
    raise ConfigError(f'decoder_params {sorted(unknown)} are not among {sorted(_DECODER)}.')
  return {_DECODER[name]: value for name, value in given.items()}


def _metrics(loss: Array, aux: dict, count: Array, batch: Batch) -> dict[str, Any]:
  """Under t5x's names. Of microbatches, AveragePerStep adds up, as for every model of t5x."""
  scalars, router = aux['scalars'], aux['router']
  step = lambda x: t5x_metrics.AveragePerStep(total=x)
  rate = lambda n: t5x_metrics.TimeRate.from_model_output(numerator=jnp.asarray(n))
  rows, tokens = batch.targets.shape[0], batch.targets.size
  metrics = {
    'loss': step(loss),
    'cross_ent_loss': step(scalars['cross_entropy']),
    'z_loss': step(scalars['logit_z_loss']),
    'accuracy': clu_metrics.Average(total=scalars['accuracy'] * count, count=count),
    'non_padding_fraction/loss_weights': clu_metrics.Average(
      total=count, count=jnp.asarray(tokens)
    ),
    'timing/seqs_per_second': rate(rows),
    'timing/target_tokens_per_second': rate(tokens),
    'timing/steps_per_second': t5x_metrics.StepsPerTime.from_model_output(),
    'timing/seconds': t5x_metrics.Time(),
  }
  if router is not None:
    metrics |= {
      'experts/auxiliary_loss': step(scalars['load_balance_loss']),
      'experts/router_z_loss': step(scalars['router_z_loss']),
      'experts/fraction_tokens_left_behind': step(jnp.mean(router.tokens_left_behind)),
      'experts/expert_usage': step(jnp.mean(router.expert_usage)),
      'experts/router_confidence': step(jnp.mean(router.router_confidence)),
    }
  return metrics
