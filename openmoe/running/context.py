"""What the loop of a run works with."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from openmoe.checkpoint.checkpointer import Checkpointer
from openmoe.config import TrainConfig
from openmoe.feed import Feed
from openmoe.health.watch import Watch
from openmoe.observe.batches import BatchRecords
from openmoe.observe.metrics import MetricsWriter
from openmoe.observe.timeline import Timeline
from openmoe.running.lease import Lease
from openmoe.running.metadata import RunMetadata
from openmoe.running.probe import Probe
from openmoe.running.signals import Signals
from openmoe.running.validation import Evaluation
from openmoe.train_step import TrainState


@dataclasses.dataclass
class Running:
  """What the loop of a run works with; all of it is open, and closed by train().

  Attributes:
    run: see openmoe.config.
    step: optimizer steps done.
    state: after that step, on the mesh.
    step_fn: (state, batch) -> (state, metrics); it takes the state's memory.
    evaluate: params -> validation metrics; None when that is off.
    describe: step -> what its checkpoint says of the run.
  """

  run: TrainConfig
  step: int
  state: TrainState
  step_fn: Callable
  feed: Feed
  evaluate: Evaluation | None
  checkpointer: Checkpointer
  describe: RunMetadata
  writer: MetricsWriter
  signals: Signals
  lease: Lease
  timeline: Timeline
  batches: BatchRecords | None
  watch: Watch
  probe: Probe

  @contextlib.contextmanager
  def aside(self, phase: str) -> Iterator[None]:
    """Time spent inside is of this phase, and no time of training."""
    with self.timeline.inside(phase, self.step), self.writer.paused():
      yield

  def validate(self) -> dict[str, float]:
    """Evaluates, and writes down what was found."""
    with self.aside('evaluation'):
      found = self.evaluate(self.state.params)
      self.describe.validated(self.step, found)
      self.writer.write(self.step, found, kind='validation')
    return found
