"""Fine-tuning of a classifier: its head, or all of it, with AdamW on one device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from openmoe.classification.classifier import Classifier, make_batch
from openmoe.classification.examples import Example, classes
from openmoe.classification.step import abstract_classifier, classification_step
from openmoe.config import ConfigError, ModelConfig, OptimizerConfig
from openmoe.optimizer import learning_rate, make_optimizer
from openmoe.train_step import TrainState
from openmoe.types import Array


class DivergedError(RuntimeError):
  """The loss is no longer finite."""

  exit_code = 65


@dataclasses.dataclass(frozen=True)
class FitConfig:
  """How to train.

  Attributes:
    backbone: whether the language model is trained as well as the head.
    epochs: how often each record is seen.
    batch_size: records of a step; all of them where there are fewer.
    learning_rate: the highest, reached after a twentieth of the steps; it ends at a tenth.
    seed: of the head, the order of records and dropout.
  """

  backbone: bool = False
  epochs: int = 3
  batch_size: int = 16
  learning_rate: float = 1e-3
  seed: int = 0

  def __post_init__(self):
    for name in ('epochs', 'batch_size', 'learning_rate'):
      value = getattr(self, name)
      if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f'{name}={value} must be more than 0.')
    if not 0 <= self.seed < 1 << 32:
      raise ConfigError(f'seed={self.seed} must be in 0..{(1 << 32) - 1}.')


def new_head(config: ModelConfig, num_classes: int, seed: int) -> dict[str, Array]:
  """Parameters of a head that knows nothing."""
  draw = jax.random.normal(jax.random.key(seed), (config.embed_dim, num_classes))
  return {'kernel': config.init_std * draw}


def _optimizer(fit: FitConfig, classifier: Classifier, steps: int) -> optax.GradientTransformation:
  config = OptimizerConfig(
    name='adamw', schedule='cosine', learning_rate=fit.learning_rate, warmup_steps=steps // 20,
    clip_global_norm=1.0, b2=0.999, weight_decay=0.01,
  )  # fmt: skip
  _, axes = abstract_classifier(classifier.config, len(classifier.labels))
  if fit.backbone:
    return make_optimizer(config, axes, learning_rate(config, steps))
  # No moments are kept of what does not move, nor are its gradients computed.
  head = make_optimizer(config, axes | {'backbone': ()}, learning_rate(config, steps))
  parts = {'moves': head, 'stays': optax.set_to_zero()}
  return optax.multi_transform(parts, {'backbone': 'stays', 'score': 'moves'})


def fit(
  classifier: Classifier,
  examples: Sequence[Example],
  config: FitConfig,
  note: Callable[[str], None] = print,
) -> Classifier:
  """The classifier after training on all examples; routing drops nothing, as when it is used.

  Args:
    classifier: untrained, or trained on other examples.
    note: receives a line of text an epoch.

  Raises:
    DamagedFile: an example has a label that the classifier does not know.
    DivergedError: the loss is not finite.
  """
  rows = [classifier.encode(example.text) for example in examples]
  labels = np.asarray(classes(examples, classifier.labels), np.int32)
  size = min(config.batch_size, len(rows))
  each = math.ceil(len(rows) / size)
  optimizer = _optimizer(config, classifier, each * config.epochs)
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), classifier.params)
  state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
  step = jax.jit(
    lambda state, batch, labels_b: classification_step(
      state, batch, labels_b,
      model=classifier.model, config=classifier.model.config, optimizer=optimizer,
      seed=config.seed,
    )
  )  # fmt: skip
  rng = np.random.default_rng(config.seed)
  for epoch in range(config.epochs):
    seen = []
    # The last batch of an epoch is filled with records of its beginning.
    for chosen in np.resize(rng.permutation(len(rows)), (each, size)):
      batch = make_batch([rows[i] for i in chosen], size, classifier.max_length)
      state, metrics = step(state, batch, jnp.asarray(labels[chosen]))
      seen.append((float(metrics['loss']), float(metrics['accuracy'])))
      if not math.isfinite(seen[-1][0]):
        raise DivergedError(
          f'The loss of step {int(state.step)} is {seen[-1][0]}; lower --learning_rate, or look at '
          'the checkpoint with `python -m convert fsck`.'
        )
    loss, accuracy = np.mean(seen, axis=0)
    note(f'epoch {epoch + 1} of {config.epochs}: loss {loss:.4f}, accuracy {accuracy:.4f}')
  return dataclasses.replace(classifier, params=state.params)
