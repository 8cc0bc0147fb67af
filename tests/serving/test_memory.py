"""The plan of memory says what models then hold."""

import dataclasses

import jax
import pytest

from openmoe.config import ConfigError
from openmoe.inference import int8
from openmoe.inference.placement import cast
from openmoe.models.decoding import unstack
from openmoe.serving import memory
from openmoe.serving.slots import cache_bytes
from tests.inference import case


@pytest.mark.parametrize('form', memory.FORMS)
@pytest.mark.parametrize('name', ['openmoe', 'jetmoe'])
def test_a_plan_counts_what_a_model_holds_and_reads(name, form):
  weights = form if form.startswith('int8') else 'float'
  dtype = form if weights == 'float' else 'float32'
  config = dataclasses.replace(case.CONFIGS[name], dtype=dtype)
  params = int8.quantised(unstack(case.parameters(name), config), config, weights)
  params = cast(params, config)
  found = memory.need(config, form, 2, 64)
  assert found.experts + found.others == sum(x.nbytes for x in jax.tree.leaves(params))
  assert found.read == pytest.approx(int8.bytes_a_token(params, config), abs=64)
  assert found.cache == cache_bytes(config, 2, 64)


def test_the_plan_marks_what_was_asked_for():
  config = case.CONFIGS['openmoe']
  told = memory.plan(config, 2, 64, offload='disk', expert_budget=1 << 20).splitlines()
  assert [line.split()[0] for line in told[1:-1]] == list(memory.FORMS)
  assert 'asked for, of 0.000 GiB in disk' in told[1] and 'asked' not in ''.join(told[2:])
  with pytest.raises(ConfigError, match='slots=0'):
    memory.plan(config, 0, 64)
