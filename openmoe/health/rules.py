"""The table of rules: what is watched, when it counts as ill, what is done, and who says so.

A rule looks at one scalar of the records of a run (metrics.jsonl). It fires where a share of the
last `window` records lies beyond its limit, and may fire again once that share has sunk to `clear`.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

from openmoe.config import ConfigError
from openmoe.config.step import check_fields, require
from openmoe.observe.notes import TIMED


class Measure(enum.Enum):
  """What of a scalar is compared with the limit."""

  VALUE = 'value'  # the scalar itself
  RATIO = 'ratio'  # over the median of the `baseline` records before
  ROBUST_Z = 'robust_z'  # distance from that median in 1.4826 median absolute deviations of them


class Action(enum.Enum):
  """What is done when a rule fires; all of it is noted, too."""

  NOTE = 'note'
  SAVE = 'save'  # a checkpoint now
  SKIP = 'skip'  # steps beyond the limit change nothing; see guard.py
  LOWER_RATE = 'lower_rate'  # `factor` times the learning rate until the rule clears
  STOP = 'stop'  # the run ends with 65, without another checkpoint


# What a step can be skipped for: the compiled step knows them before it changes anything.
SKIPPABLE = ('loss', 'grad_norm')


@dataclasses.dataclass(frozen=True)
class Rule:
  """One row of the table.

  Attributes:
    name: of the rule, in events and in HealthConfig.actions.
    metric: scalar of the records; records without it are passed over.
    kind: of the records: train, validation, checkpoint.
    above, below: the limit; one of the two.
    measure: what is compared with it; `baseline` records for those that need them, whose median
      (RATIO) or deviation (ROBUST_Z) counts as no less than `floor`.
    window, share, clear: fires when at least `share` of the last `window` records are beyond the
      limit, clears when at most `clear` of them are.
    after: steps during which the rule sleeps: routers find their balance at first.
    action: see Action; `factor` is LOWER_RATE's.
    why: what it means, for a person; `source`: who has seen it.
  """

  name: str
  metric: str
  above: float | None = None
  below: float | None = None
  kind: str = 'train'
  measure: Measure = Measure.VALUE
  baseline: int = 32
  floor: float = 0.0
  window: int = 10
  share: float = 0.8
  clear: float = 0.4
  after: int = 0
  action: Action = Action.NOTE
  factor: float = 0.5
  why: str = ''
  source: str = ''

  def __post_init__(self):
    check_fields(self, zero=('after', 'clear', 'above', 'below', 'floor'))
    require(bool(self.name and self.metric), 'A health rule needs a name and a metric.')
    one = (self.above is None) != (self.below is None)
    require(one, f'Health rule {self.name!r} needs one limit: above or below.')
    require(
      0 <= self.clear < self.share <= 1,
      f'Health rule {self.name!r}: clear={self.clear} must lie under share={self.share}, which is '
      'at most 1, so that a rule which has fired does not fire at every record.',
    )
    require(
      self.action in (Action.NOTE,) or self.metric not in TIMED,
      f'Health rule {self.name!r} watches {self.metric}, which differs between processes: its '
      f'action can only be note, not {self.action.value}.',
    )
    require(
      self.action is not Action.SKIP or (self.metric in SKIPPABLE and self.above is not None),
      f'Health rule {self.name!r}: steps can be skipped where one of {", ".join(SKIPPABLE)} is '
      f'above a limit, not for {self.metric}.',
    )
    require(
      0 < self.factor < 1, f'Health rule {self.name!r}: factor={self.factor} must be within 0 to 1.'
    )

  @property
  def limit(self) -> str:
    """The limit in words."""
    side = f'above {self.above:g}' if self.below is None else f'below {self.below:g}'
    of = {Measure.VALUE: '', Measure.RATIO: ' times the median before'}
    return side + of.get(self.measure, ' robust deviations from the median before')


_ZOPH = 'ST-MoE (Zoph et al. 2022): router z-loss against growing router logits'
_SHAZEER = 'Shazeer et al. 2017: favoured experts are trained more and chosen yet more'
_SWITCH = 'Switch Transformer (Fedus et al. 2021): under 1 % is dropped where the load is balanced'
_OPENMOE = 'OpenMoE (Xue et al. 2024): drop towards the end, up to a third of the last tokens'
_OLMOE = 'OLMoE (Muennighoff et al. 2024): router saturation rises early and stays'
_PALM = 'PaLM (Chowdhery et al. 2022), 5.1: some 20 spikes, passed by skipping batches'
_OLMO = 'OLMo 2 (2024): spike score, values 7 deviations from the average of 1,000 before'
_GLM = 'GLM-130B (Zeng et al. 2022): gradient norms leap some steps before a collapse'
_MEGASCALE = 'MegaScale (Jiang et al. 2024): over 90 % of the wall time trains'

PRESETS: tuple[Rule, ...] = (
  Rule(
    'dead_experts', 'dead_steps', above=500, window=3, share=1.0, clear=0.0, source=_SHAZEER,
    why='An expert has had less than 1 % of its share for 500 steps in a row; it hardly recovers.',
  ),
  Rule(
    'load_peak', 'expert_load_max', above=6.0, window=20, after=50, source=_SHAZEER,
    why='One expert gets more than 6 times its share: its device waits for nobody, all for it.',
  ),
  Rule(
    'load_entropy', 'effective_experts', below=0.5, window=20, after=50, source=_SHAZEER,
    why='The load of a layer is worth less than half of its experts: exp(entropy) / E.',
  ),
  Rule(
    'avoidable_drops', 'avoidable_drops', above=0.2, window=20, after=50, source=_SWITCH,
    why='A fifth of the choices is dropped beside empty slots: imbalance, not capacity.',
  ),
  Rule(
    'drops_rise', 'dropped_fraction', above=1.5, measure=Measure.RATIO, baseline=64, floor=0.05,
    after=50, source=_SWITCH, why='Half as much again is dropped as before.',
  ),
  Rule(
    'late_drops', 'late_drop_excess', above=0.3, window=20, after=50, source=_OPENMOE,
    why='The last quarter of the rows loses far more than the rest; later tokens learn less.',
  ),
  Rule(
    'late_drops_rise', 'late_drop_excess', above=1.3, measure=Measure.RATIO, baseline=64, floor=0.1,
    after=50, source=_OPENMOE, why='Drops move towards the end of the rows.',
  ),
  Rule(
    'router_logits', 'router_logsumexp', above=2.0, measure=Measure.RATIO, baseline=64, window=10,
    after=50, source=_ZOPH, why='Router logits have doubled; rounding decides between experts.',
  ),
  Rule(
    'router_logits_large', 'router_logsumexp', above=30.0, window=10, source=_ZOPH,
    why='Router logits are so large that one expert takes all and gradients vanish.',
  ),
  Rule(
    'saturation_falls', 'router_saturation', below=0.3, kind='checkpoint', window=2, share=1.0,
    clear=0.0, after=500, source=_OLMOE,
    why='Most choices differ from those at the checkpoint before: routing has come loose.',
  ),
  Rule(
    'loss_spike', 'loss', above=7.0, measure=Measure.ROBUST_Z, floor=0.02, window=5, share=0.4,
    clear=0.0, after=50, source=f'{_OLMO}; {_PALM}', why='The loss has left its band.',
  ),
  Rule(
    'loss_peak', 'loss_max', above=20.0, measure=Measure.ROBUST_Z, floor=0.02, window=1, share=1.0,
    clear=0.0, after=50, source=_OLMO, why='A single step had a loss far out of its band.',
  ),
  Rule(
    'gradient_norm', 'grad_norm_max', above=10.0, measure=Measure.RATIO, window=5, share=0.4,
    clear=0.0, after=50, source=_GLM, why='Gradients are ten times as large as before.',
  ),
  Rule(
    'nonfinite_expert', 'nonfinite_experts', above=0.0, kind='checkpoint', window=1, share=1.0,
    clear=0.0, action=Action.STOP, source='ours: an expert that nobody chooses hides its NaN',
    why='Weights of an expert are not finite. They are not saved; an older checkpoint is whole.',
  ),
  Rule(
    'skipped_steps', 'skipped_fraction', above=0.5, window=4, share=1.0, clear=0.0,
    action=Action.STOP, source=_PALM, why='Most steps are skipped: nothing is learned any more.',
  ),
  Rule(
    'stalled_input', 'stalled_fraction', above=0.2, window=10, source=_MEGASCALE,
    why='A fifth of the time goes by waiting for data: more data shards, or faster storage.',
  ),
  Rule(
    'goodput', 'goodput', below=0.5, window=40, share=0.9, source=_MEGASCALE,
    why='Less than half of the wall time trains: evaluation, saves or data take the rest.',
  ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class HealthConfig:
  """Which rules watch a run.

  Attributes:
    rules: added to PRESETS; one of the same name takes the place of the preset.
    actions: name of a rule -> its action, for presets whose limits are right.
    without: names of rules that are left out.
  """

  rules: tuple[Rule, ...] = ()
  actions: Mapping[str, str] = dataclasses.field(default_factory=dict)
  without: tuple[str, ...] = ()

  def __post_init__(self):
    check_fields(self)
    self.table()

  def table(self) -> tuple[Rule, ...]:
    """The rules, by name once.

    Raises:
      ConfigError: actions or without name no rule, or an action is none.
    """
    rules = {rule.name: rule for rule in (*PRESETS, *self.rules)}
    for name in (*self.actions, *self.without):
      if name not in rules:
        raise ConfigError(
          f'HealthConfig names a rule {name!r}, which there is not; there are {", ".join(rules)}.'
        )
    for name, action in self.actions.items():
      rules[name] = dataclasses.replace(rules[name], action=action)
    return tuple(rule for name, rule in rules.items() if name not in self.without)
