"""FLOPs of a traced step by what they are for: the model, padding, dispatch, recomputation.

Counted are matrix products (dot_general, and the grouped products of Pallas kernels), over all
devices, loops times their trip counts. A branch counts its largest side; a loop without a known
trip count counts once and is told of.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator

import jax
from jax._src import source_info_util  # jax.extend has no frames
from jax.extend import core

from openmoe import plan
from openmoe.config import Architecture
from openmoe.pods.request import Request, trace


@dataclasses.dataclass(frozen=True)
class Flops:
  """FLOPs of one step on all devices together.

  Attributes:
    model: of the formula, plan.flops_per_token: what utilisation counts.
    recomputed: done again in the backward pass.
    dispatch: one-hot products that move rows to experts and back.
    capacity: of experts beyond the model's: padding of their buffers; negative where the capacity
      leaves choices out, whose products are never made.
    attention: above the diagonal, as far as blocks of queries reach there, and what a query gets
      that may look nowhere.
    other: what is left, rounding of the above; close to 0.
    executed: all of them.
    kernels: of executed, in Pallas kernels, for which the compiler has no estimate; they skip rows
      that nobody sent, so they count what balanced routing sends.
    unknown_loops: loops without a known trip count.
  """

  model: float
  recomputed: float
  dispatch: float
  capacity: float
  attention: float
  other: float
  executed: float
  kernels: float
  unknown_loops: int


@dataclasses.dataclass(frozen=True)
class Product:
  """Products of one place in the program: FLOPs over all devices, and where it is."""

  flops: float
  scope: str
  file: str
  function: str
  kernel: bool


def count(request: Request) -> Flops:
  """FLOPs of a step, traced here for the request's machine."""
  traced = trace(request, request.target.abstract_mesh(request.mesh))
  return split(request, *products_of(traced.jaxpr))


def split(request: Request, products: list[Product], unknown: int) -> Flops:
  """Products by what they are for."""
  # A device's buffer has room for the rows of all it exchanges with; kernels leave its rest out.
  expected = 1 / request.mesh.num_expert_partitions
  products = [dataclasses.replace(p, flops=p.flops * expected) if p.kernel else p for p in products]
  totals: dict[str, float] = collections.defaultdict(float)
  for product in products:
    totals[_purpose(product)] += product.flops
  model = plan.flops_per_token(request.model, request.row_length) * request.tokens
  experts, attention = _expert_flops(request), attention_flops(request)
  executed = sum(product.flops for product in products)
  parts = {
    # The loss multiplies three times on its way back, once for the logits that it did not keep.
    'recomputed': totals['recomputed'] + totals['loss_backward'] / 3,
    'dispatch': totals['dispatch'],
    'capacity': totals['experts'] - experts,
    'attention': totals['attention'] - attention,
  }
  return Flops(
    model=model,
    **parts,
    other=executed - model - sum(parts.values()),
    executed=executed,
    kernels=sum(product.flops for product in products if product.kernel),
    unknown_loops=unknown,
  )


def _purpose(product: Product) -> str:
  if 'rematted_computation' in product.scope:
    return 'recomputed'
  if product.file.endswith('openmoe/losses.py') and 'transpose(' in product.scope:
    return 'loss_backward'
  if product.file.endswith('moe/masks.py'):
    return 'dispatch'
  if product.function in ('attend', 'attend_packed'):
    return 'attention'
  grouped = product.kernel or '/grouped/' in product.file
  if grouped or (product.file.endswith('moe/exchange.py') and product.function == 'times'):
    return 'experts'
  return 'rest'


def _expert_flops(request: Request) -> float:
  """Of the formula, those of experts: forward and backward."""
  model = request.model
  if not model.moe:
    return 0.0
  d, k = model.embed_dim, model.moe.top_k
  if model.architecture is Architecture.JETMOE:
    heads = 2 * 2 * k * d * model.num_heads * model.head_dim
    return 3.0 * request.tokens * model.num_layers * (heads + 2 * k * 3 * d * model.mlp_dim)
  each = 2 * 4 * d * model.mlp_dim
  return 3.0 * request.tokens * model.num_sparse_layers * k * each


def attention_flops(request: Request) -> float:
  """Of the formula, logits and weighted sums of attention: the half below the diagonal."""
  model = request.model
  slots = model.moe.top_k if model.architecture is Architecture.JETMOE else 1
  width = slots * model.num_heads * model.head_dim
  return 3.0 * request.tokens * model.num_layers * 2 * 2 * (request.row_length / 2) * width


def products_of(closed: core.ClosedJaxpr) -> tuple[list[Product], int]:
  """All products of a program, and how many loops have no known trip count."""
  unknown: list[str] = []
  return list(_walk(closed.jaxpr, 1, '', unknown)), len(unknown)


def _walk(jaxpr, times: int, scope: str, unknown: list[str]) -> Iterator[Product]:
  for eqn in jaxpr.eqns:
    here = f'{scope}/{eqn.source_info.name_stack}'
    name = eqn.primitive.name
    if name == 'dot_general':
      yield _product(eqn, _dot_flops(eqn) * times, here, kernel=False)
    elif name == 'pallas_call':
      yield _product(eqn, _kernel_flops(eqn) * times, here, kernel=True)
    elif name == 'ragged_dot_general':
      lhs, rhs = (v.aval.shape for v in eqn.invars[:2])
      yield _product(eqn, 2.0 * math.prod(lhs) * rhs[-1] * times, here, kernel=True)
    elif name == 'cond':
      sides = [list(_walk(b.jaxpr, times, here, unknown)) for b in eqn.params['branches']]
      yield from max(sides, key=lambda side: sum(p.flops for p in side))
    else:
      inner = times
      if name == 'scan':
        inner *= eqn.params['length']
      elif name == 'shard_map':
        inner *= eqn.params['mesh'].size
      for program in _programs(eqn):
        found = list(_walk(program, inner, here, unknown))
        if name == 'while' and found:
          unknown.append(here)
        yield from found


def _programs(eqn) -> list:
  """Programs that an equation runs; of a while, its body."""
  if eqn.primitive.name == 'while':
    return [eqn.params['body_jaxpr'].jaxpr]
  found = []
  for value in eqn.params.values():
    if isinstance(value, core.ClosedJaxpr):
      found.append(value.jaxpr)
    elif isinstance(value, core.Jaxpr):
      found.append(value)
  return found


def _product(eqn, flops: float, scope: str, kernel: bool) -> Product:
  for frame in source_info_util.user_frames(eqn.source_info.traceback):
    file = frame.file_name.replace('\\', '/')
    if '/openmoe/' in file:
      return Product(flops, scope, file, frame.function_name.rpartition('.')[2], kernel)
  return Product(flops, scope, '', '', kernel)


def _dot_flops(eqn) -> float:
  lhs = eqn.invars[0].aval.shape
  (contract, _), _ = eqn.params['dimension_numbers']
  return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contract)


def _kernel_flops(eqn) -> float:
  """Of a grouped product: every row with the matrix of its own group, whatever the tiles are.

  [M, I] x [e, I, O] -> [M, O] and [I, M] x [M, O] -> [e, I, O] both multiply M x I x O.
  """
  wide = lambda v: jax.numpy.issubdtype(v.aval.dtype, jax.numpy.floating) and v.aval.ndim >= 2
  inputs = [v.aval.shape for v in eqn.invars if wide(v)]
  out = eqn.outvars[0].aval.shape
  stacks = [shape for shape in (*inputs, out) if len(shape) == 3]
  rows = [shape for shape in (*inputs, out) if len(shape) == 2]
  if not stacks or len(rows) < 2:
    return 0.0
  sides = stacks[0][1:]
  # What the two matrices have beside the sides of the stack is the number of rows.
  return 2.0 * math.prod(sides) * (math.prod(rows[0]) // _side_of(rows[0], sides))


def _side_of(matrix: tuple[int, ...], sides: tuple[int, ...]) -> int:
  return next((side for side in matrix[::-1] if side in sides), matrix[-1])
