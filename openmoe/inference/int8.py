"""Weight-only int8: kernels in a quarter of float32's bytes, one scale for every output.

q = round(w / scale), scale = max |w| / 127 over the inputs of an output, of an expert each; the
product is (x @ q) * scale, so activations and sums stay as they were. Router, norms and biases stay
float32 (as in bitsandbytes, GPTQ and gpt-fast, whose int8 is also of weights alone and symmetric).

On a CPU a product of XLA's library wants float32 kernels, and writing these costs more than int8
saves. A few rows are therefore multiplied in blocks of rows of the kernel, each one an elementwise
loop that reads int8 where it lies (docs/LOG.md); many rows share one float32 copy of the kernel.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp

from openmoe import partitioning
from openmoe.config import Architecture, ConfigError, ModelConfig
from openmoe.models.decoding import is_expert_kernel
from openmoe.types import Array, PyTree

WEIGHTS = ('float', 'int8', 'int8_layers')
FEW_ROWS = 4  # that are multiplied without a float32 copy of the kernel
_BLOCK = 32  # rows of a kernel in one loop: fewer cost calls, more cost registers (docs/LOG.md)


@flax.struct.dataclass
class Int8:
  """What stands for a kernel [I, ...O] or, with experts, for a stack [e, I, ...O].

  `x @ kernel` multiplies. Leaves that a layer declares come first: flax looks at their shapes.

  Attributes:
    values: int8, in the shape of the kernel.
    scale: float32 [...O], or [e, ...O].
    turned: int8 values with their two sides swapped, of an embedding that is the output layer too.
    expert: int32 scalar, the one expert of the stack that is meant; None for all.
  """

  values: Array
  scale: Array
  turned: Array | None = None
  expert: Array | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape if self.expert is None else self.values.shape[1:]

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def dtype(self) -> jnp.dtype:
    return self.scale.dtype

  @property
  def nbytes(self) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

  @property
  def T(self) -> Int8:
    """Of an embedding [v, d]: the output layer [d, v]."""
    assert self.turned is not None, 'an embedding that is no output layer has no second form'
    return Int8(self.turned, self.scale)

  def astype(self, dtype: jnp.dtype) -> Int8:
    """Itself: products have the dtype of their rows."""
    del dtype
    return self

  def at_expert(self, expert: Array) -> Int8:
    """One expert of a stack. Nothing is copied before the product."""
    return self.replace(expert=expert)

  def wide(self, dtype: jnp.dtype = jnp.float32) -> Array:
    """The values as numbers that a library multiplies, without the scale."""
    of = lambda x: jax.lax.dynamic_index_in_dim(x, self.expert, keepdims=False)
    return (self.values if self.expert is None else of(self.values)).astype(dtype)

  def rows(self, tokens: Array) -> Array:
    """Of an embedding [v, d]: its rows, float32 [..., d]."""
    return self.values[tokens].astype(jnp.float32) * self.scale[tokens][..., None]

  def _own_scale(self) -> Array:
    if self.expert is None:
      return self.scale
    return jax.lax.dynamic_index_in_dim(self.scale, self.expert, keepdims=False)

  def __rmatmul__(self, x: Array) -> Array:
    """[..., I] @ [I, ...O] -> [..., ...O] in the dtype of x."""
    rows, outputs = x.reshape(-1, x.shape[-1]), self.shape[1:]
    if partitioning.target()[0] != 'cpu':
      y = rows @ self.wide(x.dtype).reshape(rows.shape[-1], -1)
    elif rows.shape[0] <= FEW_ROWS:
      y = _few(rows.astype(jnp.float32), self)
    else:
      # Behind the barrier the copy depends on the rows, so that no loop of decoding keeps it.
      own, rows = jax.lax.optimization_barrier((self, rows))
      y = rows.astype(jnp.float32) @ own.wide().reshape(rows.shape[-1], -1)
    y = y.reshape(*x.shape[:-1], *outputs)
    return (y * self._own_scale()).astype(x.dtype)

  def batched(self, rows_eRI: Array) -> Array:
    """[e, R, I] times [e, I, ...O] -> [e, R, ...O]; one expert alone as a plain product."""
    if self.expert is not None:
      return (rows_eRI[0] @ self)[None]
    own, rows_eRI = jax.lax.optimization_barrier((self, rows_eRI))
    dimensions = (((2,), (1,)), ((0,), (0,)))
    y = jax.lax.dot_general(rows_eRI, own.wide(rows_eRI.dtype), dimensions)
    return (y * own.scale[:, None]).astype(rows_eRI.dtype)


def _few(rows_RI: Array, kernel: Int8) -> Array:
  """Products [R, O] of few rows, without the scale and without a wide copy of the kernel."""
  r, size = rows_RI.shape
  one_expert = kernel.expert is not None
  values = kernel.values.reshape(*kernel.values.shape[: 2 if one_expert else 1], -1)
  outputs = values.shape[-1]

  def block(first: Array | int, count: int, y_RO: Array) -> Array:
    x_Rc = jax.lax.dynamic_slice(rows_RI, (0, first), (r, count))
    if one_expert:
      q_cO = jax.lax.dynamic_slice(values, (kernel.expert, first, 0), (1, count, outputs))[0]
    else:
      q_cO = jax.lax.dynamic_slice(values, (first, 0), (count, outputs))
    parts = [x_Rc[:, i, None] * q_cO[i].astype(jnp.float32) for i in range(count)]
    while len(parts) > 1:  # a tree: sums are shorter chains, and exact to more bits
      odd = parts[len(parts) // 2 * 2 :]
      parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + odd
    return y_RO + parts[0]

  y_RO = jnp.zeros((r, outputs), jnp.float32)
  blocks, rest = divmod(size, _BLOCK)
  if blocks:
    y_RO = jax.lax.fori_loop(0, blocks, lambda i, y: block(i * _BLOCK, _BLOCK, y), y_RO)
  return block(blocks * _BLOCK, rest, y_RO) if rest else y_RO


def quantise(kernel: Array, inputs: int) -> Int8:
  """The nearest int8 form.

  Args:
    inputs: the axis that is summed over.
  """
  kernel = jnp.asarray(kernel, jnp.float32)
  largest = jnp.max(jnp.abs(kernel), axis=inputs, keepdims=True)
  scale = jnp.where(largest > 0, largest, 1.0) / 127
  return Int8(jnp.round(kernel / scale).astype(jnp.int8), jnp.squeeze(scale, inputs))


def is_int8(x: Any) -> bool:
  return isinstance(x, Int8)


def check_weights(weights: str, mesh: Any) -> None:
  """Raises ConfigError where weights cannot be held so."""
  if weights not in WEIGHTS:
    raise ConfigError(f'weights={weights!r} is not one of {list(WEIGHTS)}; choose one of these.')
  if weights != 'float' and mesh is not None:
    raise ConfigError(
      f'weights={weights!r} lie on one device, and this mesh has {mesh.size}: show the program one '
      'device, or take float weights.'
    )


def quantised(params: PyTree, config: ModelConfig, weights: str) -> PyTree:
  """Parameters with int8 kernels; those that are int8 already stay.

  Args:
    params: as decoding.unstack gives them, experts as stacks; all or some of them.
    weights: of WEIGHTS; 'int8_layers' leaves embedding and output layer as they are.
  """
  if weights == 'float':
    return params
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  done = {path: _of_path(path, leaf, config, weights) for path, leaf in flat.items()}
  return flax.traverse_util.unflatten_dict(done, sep='/')


def _of_path(path: str, leaf: Any, config: ModelConfig, weights: str) -> Any:
  if is_int8(leaf):
    return leaf
  if path.startswith('layer_'):
    is_kernel = path.endswith('/kernel') and '/router/' not in path
    return quantise(leaf, 1 if is_expert_kernel(path, config) else 0) if is_kernel else leaf
  if weights != 'int8':
    return leaf
  if path == 'logits_dense/kernel':
    return quantise(leaf, 0)
  if path == 'token_embedder/embedding':
    found = quantise(leaf, 1)
    tied = config.architecture is Architecture.JETMOE
    return found.replace(turned=found.values.T) if tied else found
  return leaf


def bytes_a_token(params: PyTree, config: ModelConfig) -> int:
  """Bytes of weights that one token of one row reads: experts by top_k of all, one embedding row.

  Args:
    params: as decoding.unstack gives them, in any form.
  """
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  size = lambda x: sum(leaf.nbytes for leaf in jax.tree.leaves(x))
  found = 0
  for path, leaf in flat.items():
    if is_expert_kernel(path, config):
      forms = leaf.arrays if hasattr(leaf, 'arrays') else leaf
      found += size(forms) * config.moe.top_k // config.moe.num_experts
    elif path == 'token_embedder/embedding':
      tied = config.architecture is Architecture.JETMOE
      used = leaf.replace(values=leaf.turned, turned=None) if is_int8(leaf) and tied else leaf
      found += size(used) if tied else size(leaf) // config.vocab_size
    else:
      found += size(leaf)
  return found
