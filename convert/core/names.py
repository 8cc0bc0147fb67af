"""The one name table: our parameters beside the names that other formats give them.

Ours are stacked over scanned layers; elsewhere every layer has arrays of its own. A `Row` says
which slice of which of our arrays is which foreign tensor, and how the two are laid out. Readers,
writers, checks and tests all go through these rows, so a name is written down once.

Another architecture adds a function that yields its rows and a line in _TABLES.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from openmoe.config import Architecture, ModelConfig
from openmoe.models.common import group_shape

MOST_LAYERS = 4096
_MOST_NEAR = 16


class NamesError(ValueError):
  """Names are missing, unknown or doubled; the message gives the nearest right ones."""

  exit_code = 64


@dataclasses.dataclass(frozen=True)
class Row:
  """One foreign tensor, or a part of one.

  Attributes:
    ours: '/'-joined path of our array.
    index: leading indices into it (group, group and dense layer, or layer); () takes it whole.
    t5x: '/'-joined path in a t5x / flaxformer checkpoint; None where there is no such thing.
    hf: name in a PyTorch state_dict.
    part: (i, n): the PyTorch tensor is n of these, joined along its first axis; this is number i.
    layer: 0-based layer, None outside the stack.
    block: what `ours` begins with inside the stack, such as 'decoder/sparse/'.
    gated: ours is [..., d, 2, f] where the others have [..., d, 2f].
    transposed: the PyTorch tensor has the last two axes of the t5x one exchanged.
    experts: the first axis of the tensor counts experts.
    hf_aliases: other PyTorch names that may repeat this tensor (tied weights).
  """

  ours: str
  index: tuple[int, ...]
  t5x: str | None
  hf: str
  part: tuple[int, int] = (0, 1)
  layer: int | None = None
  block: str = ''
  gated: bool = False
  transposed: bool = False
  experts: bool = False
  hf_aliases: tuple[str, ...] = ()

  @property
  def name(self) -> str:
    """Name of this row alone: the PyTorch one, with the part where there are several."""
    number, count = self.part
    return self.hf if count == 1 else f'{self.hf}[{number} of {count}]'

  @property
  def place(self) -> str:
    """Path inside the block; the whole path outside the stack."""
    return self.ours.removeprefix(self.block)

  def rows_of(self, total: int) -> tuple[int, int]:
    """(first, last + 1) of the rows that are this part, of a PyTorch tensor of `total` rows."""
    number, count = self.part
    return number * total // count, (number + 1) * total // count

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
    """The PyTorch tensor, or this part of it, from our whole array."""
    x = self.to_t5x(ours)
    return x.swapaxes(-1, -2) if self.transposed else x

  def from_hf(self, theirs: np.ndarray) -> np.ndarray:
    """Our slice from the whole PyTorch tensor."""
    x = theirs[slice(*self.rows_of(len(theirs)))]
    return self.from_t5x(x.swapaxes(-1, -2) if self.transposed else x)


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
        layer=layer,
        block=f'decoder/{kind}/',
        gated='wi_0' in ours,
        transposed=ours.endswith('kernel') and not experts,
        experts=experts,
      )
  yield Row('decoder_norm/scale', (), 'decoder/decoder_norm/scale', 'model.norm.weight')
  logits = 'logits_dense/kernel'
  yield Row(logits, (), f'decoder/{logits}', 'lm_head.weight', transposed=True)


# The same of transformers' JetMoE, whose expert stacks are [expert, out, in].
_JETMOE = {
  'pre_attention_norm/scale': 'input_layernorm.weight',
  'attention/bias': 'self_attention.experts.bias',
  'attention/query/kernel': 'self_attention.experts.input_linear.weight',
  'attention/out/kernel': 'self_attention.experts.output_linear.weight',
  'attention/router/kernel': 'self_attention.experts.router.layer.weight',
  'attention/key/kernel': 'self_attention.kv_proj.weight',
  'attention/value/kernel': 'self_attention.kv_proj.weight',
  'pre_mlp_norm/scale': 'post_attention_layernorm.weight',
  'moe/bias': 'mlp.bias',
  'moe/experts/wi_0/kernel': 'mlp.input_linear.weight',
  'moe/experts/wo/kernel': 'mlp.output_linear.weight',
  'moe/router/kernel': 'mlp.router.layer.weight',
}
_JETMOE_PARTS = {'attention/key/kernel': (0, 2), 'attention/value/kernel': (1, 2)}
_JETMOE_EXPERTS = ('attention/query/', 'attention/out/', 'moe/experts/')


def _jetmoe_rows(config: ModelConfig, backbone: str = '') -> Iterator[Row]:
  """Rows of JetMoE; `backbone` is what our paths begin with."""
  embedding, block = f'{backbone}token_embedder/embedding', f'{backbone}decoder/'
  # Tied: state dicts and .bin files may repeat it as the output layer.
  aliases = () if backbone else ('lm_head.weight',)
  yield Row(embedding, (), None, 'model.embed_tokens.weight', hf_aliases=aliases)
  for layer in range(config.num_layers):
    for ours, hf in _JETMOE.items():
      yield Row(
        f'{block}{ours}',
        (layer,),
        None,
        f'model.layers.{layer}.{hf}',
        part=_JETMOE_PARTS.get(ours, (0, 1)),
        layer=layer,
        block=block,
        gated='wi_0' in ours,
        transposed=ours.endswith('kernel'),
        experts=ours.startswith(_JETMOE_EXPERTS),
      )
  yield Row(f'{backbone}decoder_norm/scale', (), None, 'model.norm.weight')


_TABLES: dict[Architecture, Callable[[ModelConfig], Iterator[Row]]] = {
  Architecture.OPENMOE: _openmoe_rows,
  Architecture.JETMOE: _jetmoe_rows,
}


def name_table(config: ModelConfig) -> Iterator[Row]:
  """Every foreign tensor of a language model, in layer order.

  Raises:
    NamesError: it has more layers than any model has, or parameters that no other form has.
  """
  if config.moe and config.moe.balance_loss == 'loss_free':
    raise NamesError(
      f'{config.name}: balance_loss=loss_free gives every router a bias, for which t5x and Hugging '
      'Face have no name; such a model stays a run of ours.'
    )
  if config.num_layers > MOST_LAYERS:  # before a million names are made
    raise NamesError(
      f'{config.name} has {config.num_layers} layers; at most {MOST_LAYERS} are read.'
    )
  return _TABLES[config.architecture](config)


def classifier_table(config: ModelConfig) -> Iterator[Row]:
  """As name_table, for models.classifier beside transformers' JetMoeForSequenceClassification.

  Raises:
    NamesError: transformers has no such class for this architecture.
  """
  if config.architecture is not Architecture.JETMOE:
    raise NamesError(
      f'{config.name} is an {config.architecture.value}, which has no published sequence '
      'classifier; classifiers convert for jetmoe.'
    )
  yield from _jetmoe_rows(config, 'backbone/')
  yield Row('score/kernel', (), None, 'score.weight', transposed=True)


def hf_names(rows: Iterable[Row]) -> list[str]:
  """PyTorch names, each once, in order; tied tensors are not repeated."""
  return list(dict.fromkeys(row.hf for row in rows))


def to_hf(rows: Iterable[Row], ours: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """A PyTorch state_dict from our whole arrays by '/'-joined path, all in memory."""
  parts: dict[str, list[np.ndarray]] = {}
  for row in rows:
    parts.setdefault(row.hf, []).append(row.to_hf(ours[row.ours]))
  return {
    name: np.ascontiguousarray(x[0] if len(x) == 1 else np.concatenate(x))
    for name, x in parts.items()
  }


def listed(problems: Sequence[str], most: int = 8) -> str:
  """The first problems in one sentence, and how many more there are."""
  rest = len(problems) - most
  return '; '.join(problems[:most]) + (f'; and {rest} more' if rest > 0 else '')


def refuse_names(where: object, problems: Sequence[str]) -> None:
  """Raises NamesError if there are problems with the names in a checkpoint."""
  if problems:
    raise NamesError(
      f'{where}: {listed(problems)}. Is --model the one that these weights belong to?'
    )


def check_names(found: Iterable[str], expected: Iterable[str], where: object) -> None:
  """Raises NamesError unless the names found are the expected ones, each once."""
  refuse_names(where, name_problems(found, expected))


def name_problems(found: Iterable[str], expected: Iterable[str]) -> list[str]:
  """One phrase per missing, unknown or doubled name."""
  found, expected = list(found), list(expected)
  present, wanted = set(found), set(expected)
  missing = [name for name in expected if name not in present]
  problems = []
  unknown = sorted(present - wanted)
  # Looking for near names takes long; nobody reads more than a few.
  problems += [f'{name} does not belong' for name in unknown[_MOST_NEAR:]]
  for name in unknown[:_MOST_NEAR]:
    near = difflib.get_close_matches(name, missing or expected, n=1, cutoff=0.4)
    problems.append(
      f'{name} does not belong' + (f' (nearest name of the model: {near[0]})' if near else '')
    )
  problems += [f'{name} is missing' for name in missing]
  doubled = sorted(name for name, count in collections.Counter(found).items() if count > 1)
  return problems + [f'{name} is there more than once' for name in doubled]


def expected_shapes(rows: Iterable[Row], ours: Mapping[str, tuple[int, ...]]) -> dict[str, tuple]:
  """Shape of every row in the common layout, t5x's: {row.name: shape}.

  Args:
    ours: shapes of our stacked arrays by path.
  """
  shapes = {}
  for row in rows:
    shape = ours[row.ours][len(row.index) :]
    if row.gated:
      shape = (*shape[:-2], shape[-2] * shape[-1])
    shapes[row.name] = tuple(shape)
  return shapes
