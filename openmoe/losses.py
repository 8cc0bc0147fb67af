"""The token loss, and the total that training minimises.

Cross-entropy goes through the output layer in blocks of the vocabulary: [tokens, vocab] logits
are never held, in the forward or the backward pass, and with the vocabulary split over the mesh
every device goes through its own columns.
"""

from __future__ import annotations

import functools

import flax.struct
import jax
import jax.numpy as jnp

from openmoe import partitioning
from openmoe.config import MoEConfig, RouterLoss
from openmoe.layers.moe.balance import pooled
from openmoe.types import Array, RouterStats


@flax.struct.dataclass
class TokenLoss:
  """Weighted sums over tokens, float32 scalars.

  Attributes:
    total: cross-entropy plus logit z-loss; the only field with a gradient.
    logit_z_loss: its z-loss part, z_weight * logsumexp^2.
    correct: weight of the tokens whose target has the largest logit.
  """

  total: Array
  logit_z_loss: Array
  correct: Array


_TOKEN = ('act_batch',)
_HIDDEN = ('act_batch', None)
_KERNEL = (None, 'vocab')


def token_loss(
  hidden_Nd: Array,
  kernel_dv: Array,
  targets_N: Array,
  weights_N: Array,
  z_weight: float,
  vocab_block: int,
) -> TokenLoss:
  """Sum over tokens of weight * (logsumexp - target logit + z_weight * logsumexp^2).

  To get a mean over a global batch divide the weights beforehand: then microbatches simply add.
  The z-loss keeps the logsumexp near 0 (t5x losses.py `cross_entropy_with_logits`).

  Args:
    hidden_Nd: any float dtype; logits are float32.
    kernel_dv: float32 output layer.
    targets_N: int32.
    weights_N: float32; 0 leaves a token out.
    vocab_block: columns held at once.
  """
  sums, _ = _token_loss(hidden_Nd, kernel_dv, targets_N, weights_N, z_weight, vocab_block)
  return sums


def _blocks(columns: int, block: int) -> tuple[int, int]:
  """(block width, number of blocks); the last block may overlap the one before."""
  block = min(block, columns)
  return block, -(-columns // block)


def _block_logits(hidden_Nd, kernel_dv, block: int, i: Array):
  """Float32 logits of the i-th block, its first column, and which columns are not repeats.

  256384 = 128 * 2003 has no useful divisors, so the last block is moved back to fit.
  """
  start = jnp.minimum(i * block, kernel_dv.shape[1] - block)
  columns_v = start + jnp.arange(block)
  kernel = jax.lax.dynamic_slice_in_dim(kernel_dv, start, block, axis=1)
  logits_Nv = hidden_Nd.astype(jnp.float32) @ kernel.astype(jnp.float32)
  return jnp.where(columns_v >= i * block, logits_Nv, -jnp.inf), kernel, start


def _forward(hidden_Nd, kernel_dv, targets_N, weights_N, z_weight, vocab_block):
  """One device's tokens over its columns: (TokenLoss over all devices, logsumexp_N)."""
  block, count = _blocks(kernel_dv.shape[1], vocab_block)
  local_N = targets_N - partitioning.shard_index('vocab') * kernel_dv.shape[1]

  def body(i, carry):
    max_N, sum_N, target_N = carry
    logits_Nv, _, start = _block_logits(hidden_Nd, kernel_dv, block, i)
    new_max_N = jnp.maximum(max_N, logits_Nv.max(axis=1))
    sum_N = sum_N * jnp.exp(max_N - new_max_N) + jnp.exp(logits_Nv - new_max_N[:, None]).sum(1)
    place_N = local_N - start
    # Columns counted already stay out: their logits are -inf here.
    picked_N = jnp.take_along_axis(logits_Nv, jnp.clip(place_N, 0, block - 1)[:, None], 1)[:, 0]
    here_N = (place_N >= 0) & (place_N < block) & (picked_N > -jnp.inf)
    return new_max_N, sum_N, jnp.where(here_N, picked_N, target_N)

  n = targets_N.shape
  zeros_N = partitioning.varying(jnp.zeros(n, jnp.float32))
  carry = (zeros_N - jnp.inf, zeros_N, zeros_N)
  max_N, sum_N, target_N = jax.lax.fori_loop(0, count, body, carry)
  all_max_N = partitioning.all_max(max_N, 'vocab')
  sum_N = partitioning.all_reduce(sum_N * jnp.exp(max_N - all_max_N), 'vocab')
  target_N = partitioning.all_reduce(target_N, 'vocab')
  logsumexp_N = all_max_N + jnp.log(sum_N)
  z_N = z_weight * jnp.square(logsumexp_N)
  over_tokens = lambda x_N: partitioning.all_reduce(jnp.sum(x_N * weights_N), 'act_batch')
  sums = TokenLoss(
    total=over_tokens(logsumexp_N - target_N + z_N),
    logit_z_loss=over_tokens(z_N),
    correct=over_tokens((target_N >= all_max_N).astype(jnp.float32)),
  )
  return sums, logsumexp_N


def _backward(
  hidden_Nd, kernel_dv, targets_N, weights_N, logsumexp_N, scale, z_weight, vocab_block
):
  """Gradients for hidden states and kernel; logits are computed again block by block."""
  block, count = _blocks(kernel_dv.shape[1], vocab_block)
  local_N = targets_N - partitioning.shard_index('vocab') * kernel_dv.shape[1]
  weight_N = (weights_N * scale)[:, None]
  softmax_scale_N = weight_N * (1.0 + 2.0 * z_weight * logsumexp_N)[:, None]
  hidden_Nd = hidden_Nd.astype(jnp.float32)

  def body(i, carry):
    dhidden_Nd, dkernel_dv = carry
    logits_Nv, kernel, start = _block_logits(hidden_Nd, kernel_dv, block, i)
    dlogits_Nv = softmax_scale_N * jnp.exp(logits_Nv - logsumexp_N[:, None])
    is_target_Nv = (local_N - start)[:, None] == jnp.arange(block)
    dlogits_Nv -= jnp.where(is_target_Nv & (logits_Nv > -jnp.inf), weight_N, 0.0)
    dhidden_Nd += dlogits_Nv @ kernel.astype(jnp.float32).T
    dblock = hidden_Nd.T @ dlogits_Nv
    old = jax.lax.dynamic_slice_in_dim(dkernel_dv, start, block, axis=1)
    dkernel_dv = jax.lax.dynamic_update_slice_in_dim(dkernel_dv, old + dblock, start, axis=1)
    return dhidden_Nd, dkernel_dv

  zeros = lambda x: partitioning.varying(jnp.zeros(x.shape, jnp.float32))
  carry = (zeros(hidden_Nd), zeros(kernel_dv))
  dhidden_Nd, dkernel_dv = jax.lax.fori_loop(0, count, body, carry)
  dhidden_Nd = partitioning.all_reduce(dhidden_Nd, 'vocab')
  return dhidden_Nd, partitioning.all_reduce(dkernel_dv, 'act_batch')


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _token_loss(hidden_Nd, kernel_dv, targets_N, weights_N, z_weight, vocab_block):
  sums = TokenLoss((), (), ())
  return partitioning.per_shard(
    functools.partial(_forward, z_weight=z_weight, vocab_block=vocab_block),
    (_HIDDEN, _KERNEL, _TOKEN, _TOKEN),
    (sums, _TOKEN),
    hidden_Nd,
    kernel_dv,
    targets_N,
    weights_N,
  )


def _token_loss_fwd(hidden_Nd, kernel_dv, targets_N, weights_N, z_weight, vocab_block):
  out = _token_loss(hidden_Nd, kernel_dv, targets_N, weights_N, z_weight, vocab_block)
  return out, (hidden_Nd, kernel_dv, targets_N, weights_N, out[1])


def _token_loss_bwd(z_weight, vocab_block, residuals, cotangents):
  scale = cotangents[0].total  # the other sums are observations
  hidden_Nd, kernel_dv = residuals[:2]
  dhidden_Nd, dkernel_dv = partitioning.per_shard(
    functools.partial(_backward, z_weight=z_weight, vocab_block=vocab_block),
    (_HIDDEN, _KERNEL, _TOKEN, _TOKEN, _TOKEN, ()),
    (_HIDDEN, _KERNEL),
    *residuals,
    scale,
  )
  return dhidden_Nd.astype(hidden_Nd.dtype), dkernel_dv.astype(kernel_dv.dtype), None, None


_token_loss.defvjp(_token_loss_fwd, _token_loss_bwd)


def router_losses(stats: RouterStats | None, config: MoEConfig | None) -> dict[str, Array]:
  """The two router losses, weighted; empty for a dense model.

  OpenMoE averages each over the sparse layers (t5x MoE models.py); unweighted, load balance is
  top_k at perfect balance. JetMoE sums over all its routers, two a layer, and each is 1 at
  balance: 48 for the 8B. The z-loss is log(E)^2 a router for tiny logits. See layers.router.
  """
  if stats is None:
    return {}
  together = jnp.sum if config.router_loss is RouterLoss.SUM else jnp.mean
  balance = stats.load_balance_loss
  balance = pooled(balance) if config.balance_loss == 'mixtral' else balance
  return {
    'load_balance_loss': config.load_balance_weight * together(balance),
    'router_z_loss': config.router_z_weight * together(stats.router_z_loss),
  }
