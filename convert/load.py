"""A checkpoint of any form, straight into a tree of our parameters in memory.

For programs that run a model once and need no checkpoint of ours on the disk: evaluation,
generation, the parity checks. Nothing is held twice but one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import flax.traverse_util
import numpy as np

from convert.core.forms import Form, fill
from convert.core.names import Row, classifier_table, expected_shapes, name_table
from convert.core.source import check_source, model_shapes
from openmoe.classification.step import abstract_classifier
from openmoe.config import ModelConfig
from openmoe.models import abstract_params
from openmoe.types import PyTree


def load_params(
  form: Form,
  config: ModelConfig,
  dtype: np.dtype | None = None,
  allocate: Callable[[str, tuple[int, ...], np.dtype], np.ndarray] | None = None,
) -> PyTree:
  """Parameters of a language model as a nested dict of NumPy arrays.

  Args:
    form: as convert.core.source.find_form opens it; t5x, Hugging Face or ours.
    config: of the model, as convert.sizes.of_form tells it.
    dtype: of the arrays; None keeps what is stored.
    allocate: (path, shape, dtype) -> an array to fill, as one that lies in a file.

  Raises:
    NamesError, ConvertError: names or shapes are not the model's, a file is damaged, or a value
      overflows `dtype`.
  """
  shapes = flax.traverse_util.flatten_dict(abstract_params(config)[0], sep='/')
  ours = {path: leaf.shape for path, leaf in shapes.items()}
  return _load(form, list(name_table(config)), model_shapes(config), ours, dtype, allocate)


def load_classifier(
  form: Form, config: ModelConfig, num_classes: int, dtype: np.dtype | None = None
) -> PyTree:
  """As load_params, of transformers' JetMoeForSequenceClassification for models.classifier.

  Args:
    config: of the backbone.
    num_classes: num_labels there.
  """
  leaves = flax.traverse_util.flatten_dict(abstract_classifier(config, num_classes)[0], sep='/')
  ours = {path: leaf.shape for path, leaf in leaves.items()}
  rows = list(classifier_table(config))
  return _load(form, rows, expected_shapes(rows, ours), ours, dtype)


def _load(
  form: Form,
  rows: Sequence[Row],
  shapes: Mapping[str, tuple[int, ...]],
  ours: Mapping[str, tuple[int, ...]],
  dtype: np.dtype | None,
  allocate: Callable[[str, tuple[int, ...], np.dtype], np.ndarray] | None = None,
) -> PyTree:
  """The tree of our parameters.

  Args:
    shapes: of the rows in the common layout, by name.
    ours: shapes of our arrays, by path.
  """
  check_source(form, rows, shapes)
  params: dict[str, np.ndarray] = {}
  for row in rows:
    stored = form.parameter(row)
    if row.ours not in params:
      empty = allocate or (lambda path, shape, dtype: np.empty(shape, dtype))
      params[row.ours] = empty(row.ours, ours[row.ours], dtype or stored.dtype)
    # A view: of our stack only the leading axes are indexed, and a split gate is one axis.
    target = params[row.ours][row.index].reshape(shapes[row.name])
    fill(target, form, row)
  return flax.traverse_util.unflatten_dict(params, sep='/')
