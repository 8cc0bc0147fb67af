"""Folders of transformers' JetMoeForSequenceClassification."""

import importlib.util
import json

import numpy as np
import pytest
import safetensors.numpy

from convert import classifier as folders
from convert import verbs
from openmoe.config import ConfigError
from openmoe.data.vocabulary import train_vocabulary
from tests.parity import jetmoe as parity

needs_torch = pytest.mark.skipif(
  importlib.util.find_spec('transformers') is None or importlib.util.find_spec('torch') is None,
  reason="needs the 'torch' extra",
)
SIZES = {
  'layers': 1, 'embed': 16, 'heads': 2, 'head_dim': 8, 'experts': 4, 'top_k': 2, 'mlp': 24,
  'vocab': 320,
}  # fmt: skip


@needs_torch
def test_logits_are_those_of_transformers(tmp_path):
  import torch
  import transformers

  hf = parity.random_hf_model(SIZES, seed=1, num_labels=3)
  hf.config.id2label = {0: 'bad', 1: 'fair', 2: 'good'}
  hf.save_pretrained(tmp_path)
  train_vocabulary(str(tmp_path / 'spiece.model'), ['red green blue grey yes no\n'] * 20, 300)
  opened = folders.open_classifier(str(tmp_path))
  assert opened.labels == ('bad', 'fair', 'good') and opened.start_id == 1
  texts = ['red green', 'blue', 'no yes grey blue red']
  ours = opened.logits(texts)
  there, back = tmp_path / 'there', tmp_path / 'back'
  assert verbs.run(['classifier', str(tmp_path), str(there)]) == 0
  assert verbs.run(['classifier', str(there), str(back)]) == 0
  np.testing.assert_array_equal(folders.open_classifier(str(back)).logits(texts), ours)
  again = transformers.AutoModelForSequenceClassification.from_pretrained(back)
  assert again.config.id2label == hf.config.id2label
  for name, value in hf.state_dict().items():
    assert torch.equal(value, again.state_dict()[name]), name
  for text, row in zip(texts, ours, strict=True):
    with torch.no_grad():
      theirs = hf(torch.tensor([opened.encode(text)])).logits[0].numpy()
    np.testing.assert_allclose(row, theirs, atol=1e-5)


@pytest.mark.parametrize(
  ('facts', 'message'),
  [
    ({'architectures': ['JetMoeForCausalLM']}, 'no JetMoeForSequenceClassification: train a head'),
    ({'id2label': {'0': 'a', '2': 'b'}}, 'the head has the classes 0..1'),
    ({'id2label': {'0': 'a', '1': 'a'}}, 'more than once'),
    ({'id2label': 3}, 'id2label is 3; an object belongs there'),
  ],
)
def test_what_is_no_such_folder_is_refused(facts, message, tmp_path):
  told = {'model_type': 'jetmoe', 'architectures': [folders.PUBLISHED]}
  (tmp_path / 'config.json').write_text(json.dumps(told | facts), encoding='utf-8')
  head = {'score.weight': np.zeros((2, 16), np.float32)}
  safetensors.numpy.save_file(head, tmp_path / 'model.safetensors')
  with pytest.raises(ValueError, match=message) as error:
    folders.open_classifier(str(tmp_path))
  assert isinstance(error.value, ConfigError) or error.value.exit_code == 65
