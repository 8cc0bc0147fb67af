"""The one name table: our parameters beside the names that other formats give them.

Ours are stacked over scanned layers; elsewhere every layer has arrays of its own. A `Row` says
which slice of which of our arrays is which foreign tensor, and how the two are laid out. Readers,
writers, checks and tests all go through these rows, so a name is written down once.

Another architecture adds a function that yields its rows and a line in TABLES.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from openmoe.config import ModelConfig
from openmoe.models.openmoe import group_shape


class NamesError(ValueError):
  """Names are missing, unknown or doubled; the message gives the nearest right ones."""


@dataclasses.dataclass(frozen=True)
class Row:
  """One foreign tensor.

  Attributes:
    ours: '/'-joined path of our array.
    index: leading indices into it (group, or group and dense layer); () takes it whole.
    t5x: '/'-joined path in a t5x / flaxformer checkpoint; None where there is no such thing.
    hf: name in a PyTorch state_dict.
    layer: 0-based layer, None outside the stack.
    gated: ours is [..., d, 2, f] where the others have [..., d, 2f].
    transposed: the PyTorch tensor has the last two axes of the t5x one exchanged.
    experts: the first axis of the tensor counts experts.
    hf_aliases: other PyTorch names that may repeat this tensor (tied weights).
  """

  ours: str
  index: tuple[int, ...]
  t5x: str | None
  hf: str
  layer: int | None = None
  gated: bool = False
  transposed: bool = False
  experts: bool = False
  hf_aliases: tuple[str, ...] = ()

  def to_t5x(self, ours: np.ndarray) -> np.ndarray:
    """The foreign tensor from our whole array."""
    x = ours[self.index]
    return x.reshape(*x.shape[:-2], -1) if self.gated else x

  def from_t5x(self, theirs: np.ndarray) -> np.ndarray:
    """Our slice from the foreign tensor."""
    if not self.gated:
      return theirs
    return theirs.reshape(*theirs.shape[:-1], 2, theirs.shape[-1] // 2)

  def to_hf(self, ours: np.ndarray) -> np.ndarray:
    """The PyTorch tensor from our whole array."""
    x = self.to_t5x(ours)
    return x.swapaxes(-1, -2) if self.transposed else x

  def from_hf(self, theirs: np.ndarray) -> np.ndarray:
    """Our slice from the PyTorch tensor."""
    return self.from_t5x(theirs.swapaxes(-1, -2) if self.transposed else theirs)


# Inside a block: our path -> (t5x path, PyTorch name). Kernels of PyTorch's Linear are [out, in]
# and end in `.weight`; expert stacks are bare parameters in our own order, [expert, in, out].
_ATTENTION = {
  'pre_attention_norm/scale': ('pre_self_attention_layer_norm/scale', 'input_layernorm.weight'),
  'attention/query/kernel': ('self_attention/query/kernel', 'self_attn.q_proj.weight'),
  'attention/key/kernel': ('self_attention/key/kernel', 'self_attn.k_proj.weight'),
  'attention/value/kernel': ('self_attention/value/kernel', 'self_attn.v_proj.weight'),
  'attention/out/kernel': ('self_attention/out/kernel', 'self_attn.o_proj.weight'),
  'pre_mlp_norm/scale': ('pre_mlp_layer_norm/scale', 'post_attention_layernorm.weight'),
}
_DENSE = _ATTENTION | {
  'mlp/wi_0/kernel': ('mlp/wi_0/kernel', 'mlp.gate_proj.weight'),
  'mlp/wi_1/kernel': ('mlp/wi_1/kernel', 'mlp.up_proj.weight'),
  'mlp/wo/kernel': ('mlp/wo/kernel', 'mlp.down_proj.weight'),
}
_SPARSE = _ATTENTION | {
  'moe/router/kernel': ('mlp/router/router_weights/w/kernel', 'mlp.gate_weight'),
  'moe/experts/wi_0/kernel': ('mlp/expert/wi_0/kernel', 'mlp.experts.wi_gate'),
  'moe/experts/wi_1/kernel': ('mlp/expert/wi_1/kernel', 'mlp.experts.wi_up'),
  'moe/experts/wo/kernel': ('mlp/expert/wo/kernel', 'mlp.experts.wo'),
  'pre_extra_mlp_norm/scale': ('pre_extra_mlp_layer_norm/scale', 'pre_extra_mlp_layernorm.weight'),
  'extra_mlp/wi_0/kernel': ('extra_mlp/wi_0/kernel', 'extra_mlp.gate_proj.weight'),
  'extra_mlp/wi_1/kernel': ('extra_mlp/wi_1/kernel', 'extra_mlp.up_proj.weight'),
  'extra_mlp/wo/kernel': ('extra_mlp/wo/kernel', 'extra_mlp.down_proj.weight'),
}


def _openmoe_rows(config: ModelConfig) -> Iterator[Row]:
  embedding = 'token_embedder/embedding'
  yield Row(embedding, (), embedding, 'model.embed_tokens.weight')
  groups, num_dense, sparse = group_shape(config)
  period = num_dense + int(sparse)
  for layer in range(groups * period):
    group, place = divmod(layer, period)
    is_sparse = sparse and place == num_dense
    kind, index = ('sparse', (group,)) if is_sparse else ('dense', (group, place))
    for ours, (t5x, hf) in (_SPARSE if is_sparse else _DENSE).items():
      experts = '/experts/' in ours
      yield Row(
        f'decoder/{kind}/{ours}',
        index,
        f'decoder/layers_{layer}/{t5x}',
        f'model.layers.{layer}.{hf}',
        layer,
        gated='wi_0' in ours,
        transposed=ours.endswith('kernel') and not experts,
        experts=experts,
      )
  yield Row('decoder_norm/scale', (), 'decoder/decoder_norm/scale', 'model.norm.weight')
  logits = 'logits_dense/kernel'
  yield Row(logits, (), f'decoder/{logits}', 'lm_head.weight', transposed=True)


# One line per architecture: its configuration class -> the rows of a model.
TABLES: dict[type, Callable[..., Iterator[Row]]] = {ModelConfig: _openmoe_rows}


def name_table(config: ModelConfig) -> Iterator[Row]:
  """Every foreign tensor of a model, in layer order."""
  return TABLES[type(config)](config)


def check_names(found: Iterable[str], expected: Iterable[str], where: str) -> None:
  """Compares the names in a checkpoint with those of the model.

  Args:
    found: with repetitions, where a name comes twice.
    expected: all names that must be there, each once.

  Raises:
    NamesError: lists what is missing, unknown (with the nearest right name) or doubled.
  """
  found, expected = list(found), list(expected)
  problems = name_problems(found, expected)
  if problems:
    shown = '; '.join(problems[:8]) + (f'; and {len(problems) - 8} more' * (len(problems) > 8))
    raise NamesError(
      f'{where}: {shown}. Is --model the one that these weights belong to? '
      f'It has {len(expected)} tensors, {where} has {len(found)}.'
    )


def name_problems(found: Iterable[str], expected: Iterable[str]) -> list[str]:
  """One phrase per missing, unknown or doubled name."""
  found, expected = list(found), list(expected)
  present, wanted = set(found), set(expected)
  missing = [name for name in expected if name not in present]
  problems = []
  for name in sorted(present - wanted):
    near = difflib.get_close_matches(name, missing or expected, n=1, cutoff=0.4)
    problems.append(
      f'{name} does not belong' + (f' (nearest name of the model: {near[0]})' if near else '')
    )
  problems += [f'{name} is missing' for name in missing]
  doubled = {name for name in present if found.count(name) > 1} if len(found) > len(present) else ()
  return problems + [f'{name} is there more than once' for name in sorted(doubled)]


def expected_shapes(rows: Iterable[Row], ours: Mapping[str, tuple[int, ...]]) -> dict[str, tuple]:
  """t5x-layout shape of every row, by our path and index: {row.hf: shape}.

  Args:
    ours: shapes of our stacked arrays by path.
  """
  shapes = {}
  for row in rows:
    shape = ours[row.ours][len(row.index) :]
    if row.gated:
      shape = (*shape[:-2], shape[-2] * shape[-1])
    shapes[row.hf] = tuple(shape)
  return shapes
