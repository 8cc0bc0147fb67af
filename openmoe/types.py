"""The dataclasses that flow between the parts, and the legend of shape letters.

Arrays carry their axes as a suffix, one letter an axis. Lower case is the model's:

  b batch           t token / query position   s key position    d embed
  f mlp hidden      u gate half                v vocabulary      n attention head
  h head_dim        l sparse layer             g routing group   e expert
  c capacity slot   k choice rank

Capitals are for what a computation makes of these:

  N tokens of all rows, flattened      R rows (token, choice), or of one expert's buffer
  M slots of a layout for experts      D devices of one axis        C chunks of rows
  I, O  input, output side of a kernel F both gate halves, 2f       Q queries, t * k
  P prompts     S samples of each      W new (written) tokens
  A continuations that are scored      Y classes

So `x_btd` is [batch, length, embed] and `combine_weights_gtk` is
[group, token of the group, choice].
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax

Array = jax.Array


@flax.struct.dataclass
class Batch:
  """One batch for a causal decoder; every field is [b, t].

  Attributes:
    inputs: int32 token ids, the targets shifted right inside each segment; 0 starts a segment.
    targets: int32 token ids to predict; 0 is padding.
    loss_weights: float32, 1 where the loss counts (the targets part of an example), else 0.
    segment_ids: int32, 1, 2, ... per packed example of the row; 0 is padding.
    positions: int32 index inside the segment. The released models do not use it: their rotary
      position is the index in the row (docs/PARITY.md).
  """

  inputs: Array
  targets: Array
  loss_weights: Array
  segment_ids: Array
  positions: Array


@flax.struct.dataclass
class Routing:
  """What the router decided for G groups of T tokens; dispatchers only read it.

  Attributes:
    expert_index_gtk: int32, the k chosen experts, best first.
    combine_weights_gtk: float32 scale of each expert's output; 0 for a choice that is not served
      because its token is padding (dropped choices keep their weight: slot says they are lost).
    slot_gtk: int32 place of the choice in its expert's buffer, counted inside the group with all
      first choices before any second one; -1 for a choice that is not routed.
    stats: RouterStats of the layer.
    num_experts: of the layer (E).
    capacity: slots an expert reserves for a group; None means that every choice is served.
  """

  expert_index_gtk: Array
  combine_weights_gtk: Array
  slot_gtk: Array
  stats: RouterStats
  num_experts: int = flax.struct.field(pytree_node=False)
  capacity: int | None = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class RouterStats:
  """Losses and observations of one router; stacked over layers they gain a leading l axis.

  Attributes:
    load_balance_loss: float32 scalar, E * sum_e f_e P_e averaged over groups; top_k at balance,
      or 1 with RouterLoss.SUM.
    router_z_loss: float32 scalar, mean of logsumexp(router_logits)^2.
    expert_load_e: float32 [e], share of all routed (token, choice) pairs each expert was chosen
      for, before drops; sums to 1.
    dropped_fraction: share of routed (token, choice) pairs that found no slot.
    tokens_left_behind: share of routed tokens none of whose choices found a slot.
    expert_usage: share of capacity slots that are filled (1 for dropless).
    router_confidence: mean combine weight of the served pairs.
    late_dropped_fraction: dropped_fraction of the last quarter of every row.
  """

  load_balance_loss: Array
  router_z_loss: Array
  expert_load_e: Array
  dropped_fraction: Array
  tokens_left_behind: Array
  expert_usage: Array
  router_confidence: Array
  late_dropped_fraction: Array | float = 0.0


PyTree = Any
