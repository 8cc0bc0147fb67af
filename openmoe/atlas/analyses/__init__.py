"""The analyses by name; each takes a Study and gives an Analysis, or None where it has no data."""

from __future__ import annotations

from collections.abc import Callable

from openmoe.atlas.analyses import experts, groups, series, tokens
from openmoe.atlas.charts import Analysis
from openmoe.atlas.counts import Study

ANALYSES: dict[str, Callable[[Study], Analysis | None]] = {
  'load': groups.load,
  'groups': groups.by_label,
  'positions': groups.positions,
  'drops': groups.drops,
  'coverage': groups.coverage,
  'balance': groups.balance,
  'token_ids': tokens.token_ids,
  'top_tokens': tokens.top_tokens,
  'vocabulary': tokens.vocabulary,
  'probabilities': tokens.probabilities,
  'context': tokens.context,
  'classes': tokens.classes,
  'coactivation': experts.coactivation,
  'flow': experts.flow,
  'coupling': experts.coupling,
  'profile': experts.layer_profile,
  'attention': experts.attention,
}
# Of several records of the same tokens.
OF_SERIES: dict[str, Callable[[list[Study]], Analysis | None]] = {
  'saturation': series.saturation,
  'early': series.early,
  'stability': series.stability,
}
OF_PAIRS: dict[str, Callable[[list[Study]], Analysis | None]] = {
  'matching': series.matching,
  'difference': series.difference,
}
