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
  hidden_nd: Array,
  kernel_dv: Array,
  targets_n: Array,
  weights_n: Array,
  z_weight: float,
  vocab_block: int,
) -> TokenLoss:
  """Sum over tokens of weight * (logsumexp - target logit + z_weight * logsumexp^2).

  To get a mean over a global batch divide the weights beforehand: then microbatches simply add.
  The z-loss keeps the logsumexp near 0 (t5x losses.py `cross_entropy_with_logits`).

  Args:
    hidden_nd: any float dtype; logits are float32.
    kernel_dv: float32 output layer.
    targets_n: int32.
    weights_n: float32; 0 leaves a token out.
    vocab_block: columns held at once.
  """
  sums, _ = _token_loss(hidden_nd, kernel_dv, targets_n, weights_n, z_weight, vocab_block)
  return sums


def _blocks(columns: int, block: int) -> tuple[int, int]:
  """(block width, number of blocks); the last block may overlap the one before."""
  block = min(block, columns)
  return block, -(-columns // block)


def _block_logits(hidden_nd, kernel_dv, block: int, i: Array):
  """Float32 logits of the i-th block, its first column, and which columns are not repeats.

  256384 = 128 * 2003 has no useful divisors, so the last block is moved back to fit.
  """
  start = jnp.minimum(i * block, kernel_dv.shape[1] - block)
  columns_v = start + jnp.arange(block)
  kernel = jax.lax.dynamic_slice_in_dim(kernel_dv, start, block, axis=1)
  logits_nv = hidden_nd.astype(jnp.float32) @ kernel.astype(jnp.float32)
  return jnp.where(columns_v >= i * block, logits_nv, -jnp.inf), kernel, start


def _forward(hidden_nd, kernel_dv, targets_n, weights_n, z_weight, vocab_block):
  """One device's tokens over its columns: (TokenLoss over all devices, logsumexp_n)."""
  block, count = _blocks(kernel_dv.shape[1], vocab_block)
  local_n = targets_n - partitioning.shard_index('vocab') * kernel_dv.shape[1]

  def body(i, carry):
    max_n, sum_n, target_n = carry
    logits_nv, _, start = _block_logits(hidden_nd, kernel_dv, block, i)
    new_max_n = jnp.maximum(max_n, logits_nv.max(axis=1))
    sum_n = sum_n * jnp.exp(max_n - new_max_n) + jnp.exp(logits_nv - new_max_n[:, None]).sum(1)
    place_n = local_n - start
    # Columns counted already stay out: their logits are -inf here.
    picked_n = jnp.take_along_axis(logits_nv, jnp.clip(place_n, 0, block - 1)[:, None], 1)[:, 0]
    here_n = (place_n >= 0) & (place_n < block) & (picked_n > -jnp.inf)
    return new_max_n, sum_n, jnp.where(here_n, picked_n, target_n)

  n = targets_n.shape
  zeros_n = partitioning.varying(jnp.zeros(n, jnp.float32))
  carry = (zeros_n - jnp.inf, zeros_n, zeros_n)
  max_n, sum_n, target_n = jax.lax.fori_loop(0, count, body, carry)
  all_max_n = partitioning.all_max(max_n, 'vocab')
  sum_n = partitioning.all_reduce(sum_n * jnp.exp(max_n - all_max_n), 'vocab')
  target_n = partitioning.all_reduce(target_n, 'vocab')
  logsumexp_n = all_max_n + jnp.log(sum_n)
  z_n = z_weight * jnp.square(logsumexp_n)
  over_tokens = lambda x_n: partitioning.all_reduce(jnp.sum(x_n * weights_n), 'act_batch')
  sums = TokenLoss(
    total=over_tokens(logsumexp_n - target_n + z_n),
    logit_z_loss=over_tokens(z_n),
    correct=over_tokens((target_n >= all_max_n).astype(jnp.float32)),
  )
  return sums, logsumexp_n


def _backward(
  hidden_nd, kernel_dv, targets_n, weights_n, logsumexp_n, scale, z_weight, vocab_block
):
  """Gradients for hidden states and kernel; logits are computed again block by block."""
  block, count = _blocks(kernel_dv.shape[1], vocab_block)
  local_n = targets_n - partitioning.shard_index('vocab') * kernel_dv.shape[1]
  weight_n = (weights_n * scale)[:, None]
  softmax_scale_n = weight_n * (1.0 + 2.0 * z_weight * logsumexp_n)[:, None]
  hidden_nd = hidden_nd.astype(jnp.float32)

  def body(i, carry):
    dhidden_nd, dkernel_dv = carry
    logits_nv, kernel, start = _block_logits(hidden_nd, kernel_dv, block, i)
    dlogits_nv = softmax_scale_n * jnp.exp(logits_nv - logsumexp_n[:, None])
    is_target_nv = (local_n - start)[:, None] == jnp.arange(block)
    dlogits_nv -= jnp.where(is_target_nv & (logits_nv > -jnp.inf), weight_n, 0.0)
    dhidden_nd += dlogits_nv @ kernel.astype(jnp.float32).T
    dblock = hidden_nd.T @ dlogits_nv
    old = jax.lax.dynamic_slice_in_dim(dkernel_dv, start, block, axis=1)
    dkernel_dv = jax.lax.dynamic_update_slice_in_dim(dkernel_dv, old + dblock, start, axis=1)
    return dhidden_nd, dkernel_dv

  zeros = lambda x: partitioning.varying(jnp.zeros(x.shape, jnp.float32))
  carry = (zeros(hidden_nd), zeros(kernel_dv))
  dhidden_nd, dkernel_dv = jax.lax.fori_loop(0, count, body, carry)
  dhidden_nd = partitioning.all_reduce(dhidden_nd, 'vocab')
  return dhidden_nd, partitioning.all_reduce(dkernel_dv, 'act_batch')


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _token_loss(hidden_nd, kernel_dv, targets_n, weights_n, z_weight, vocab_block):
  sums = TokenLoss((), (), ())
  return partitioning.per_shard(
    functools.partial(_forward, z_weight=z_weight, vocab_block=vocab_block),
    (_HIDDEN, _KERNEL, _TOKEN, _TOKEN),
    (sums, _TOKEN),
    hidden_nd,
    kernel_dv,
    targets_n,
    weights_n,
  )


def _token_loss_fwd(hidden_nd, kernel_dv, targets_n, weights_n, z_weight, vocab_block):
  out = _token_loss(hidden_nd, kernel_dv, targets_n, weights_n, z_weight, vocab_block)
  return out, (hidden_nd, kernel_dv, targets_n, weights_n, out[1])


def _token_loss_bwd(z_weight, vocab_block, residuals, cotangents):
  scale = cotangents[0].total  # the other sums are observations
  hidden_nd, kernel_dv = residuals[:2]
  dhidden_nd, dkernel_dv = partitioning.per_shard(
    functools.partial(_backward, z_weight=z_weight, vocab_block=vocab_block),
    (_HIDDEN, _KERNEL, _TOKEN, _TOKEN, _TOKEN, ()),
    (_HIDDEN, _KERNEL),
    *residuals,
    scale,
  )
  return dhidden_nd.astype(hidden_nd.dtype), dkernel_dv.astype(kernel_dv.dtype), None, None


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
  return {
    'load_balance_loss': config.load_balance_weight * together(stats.load_balance_loss),
    'router_z_loss': config.router_z_weight * together(stats.router_z_loss),
  }
