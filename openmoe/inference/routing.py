"""Words for what is done to the decisions of routers; see layers/moe/override.py.

  ban=mlp.3:0,5            experts 0 and 5 of the MLP router of layer 3 are never chosen
  keep=attention:1-3       no others than these, in every attention router
  force=all:7              chosen for every token, with its own probability
  permute=mlp.3:1,0,3,2    what was meant for expert 0 goes to 1, ...; seed5 for a random order
  top_k=1                  choices of a token
  capacity_factor=0.5      of evaluation, where there is capacity

Several stand side by side with spaces between. Layers count from 0.
"""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from openmoe.config import Architecture, ConfigError, Dispatch, ModelConfig
from openmoe.inference.model import LanguageModel
from openmoe.layers.moe.override import Override

VERBS = ('ban', 'keep', 'force', 'permute')
_FIELDS = {'top_k': ('top_k', int), 'capacity_factor': ('eval_capacity_factor', float)}


def router_names(config: ModelConfig) -> tuple[str, ...]:
  """'mlp.3', ... in the order in which a model calls its routers."""
  kinds = ('attention', 'mlp') if config.architecture is Architecture.JETMOE else ('mlp',)
  return tuple(f'{kind}.{layer}' for layer in config.sparse_layers for kind in kinds)


def parse(config: ModelConfig, text: str) -> tuple[Override | None, dict[str, Any]]:
  """What a text says, for LanguageModel.overridden().

  Raises:
    ConfigError: a word is none of the above, or names what is not there.
  """
  if config.moe is None:
    raise ConfigError(f'{config.name} has no routers, so routing={text!r} has no meaning.')
  names, e = router_names(config), config.moe.num_experts
  banned, forced = np.zeros((2, len(names), e), bool)
  target = np.tile(np.arange(e, dtype=np.int32), (len(names), 1))
  fields: dict[str, Any] = {}
  changes = False
  for word in text.split():
    verb, _, rest = word.partition('=')
    if verb in _FIELDS:
      fields |= _field(verb, rest, config)
      continue
    where, colon, what = rest.partition(':')
    if verb not in VERBS or not colon:
      raise ConfigError(
        f'{word!r} is no change of routing; write one of {", ".join(VERBS)} as ban=mlp.3:0,5, or '
        'top_k=1, capacity_factor=0.5.'
      )
    changes = True
    for router in _routers(where, names, word):
      if verb == 'permute':
        target[router] = _order(what, e, word)
        continue
      experts = _experts(what, e, word)
      if verb == 'force':
        forced[router, experts] = True
      else:
        banned[router] |= np.isin(np.arange(e), experts, invert=verb == 'keep')
  top_k = fields.get('top_k', config.moe.top_k)
  for name, own_banned, own_forced in zip(names, banned, forced, strict=True):
    if e - own_banned.sum() < top_k:
      raise ConfigError(
        f'{name} would have {e - own_banned.sum()} of {e} experts left for top_k={top_k}; ban '
        'fewer.'
      )
    if own_forced.sum() > top_k or (own_forced & own_banned).any():
      raise ConfigError(f'{name}: force at most top_k={top_k} experts, and none that is banned.')
  if not changes:
    return None, fields
  return Override(*map(jnp.asarray, (banned, forced, target))), fields


def routed(model: LanguageModel, text: str) -> LanguageModel:
  """The same weights under changed decisions; the model itself for an empty text.

  Raises:
    ConfigError: see parse().
  """
  if not text.strip():
    return model
  override, fields = parse(model.trained_config, text)
  return model.overridden(override, **fields)


def _field(verb: str, text: str, config: ModelConfig) -> dict[str, Any]:
  name, kind = _FIELDS[verb]
  try:
    value = kind(text)
  except ValueError as error:
    raise ConfigError(f'{verb}={text} must be a number.') from error
  if verb == 'top_k' and not 1 <= value <= config.moe.num_experts:
    raise ConfigError(f'top_k={value} must be from 1 to num_experts={config.moe.num_experts}.')
  if verb == 'capacity_factor' and config.moe.dispatch is Dispatch.DROPLESS:
    raise ConfigError(f'{config.name} has no capacity; leave capacity_factor={text} out.')
  return {name: value}


def _routers(where: str, names: tuple[str, ...], word: str) -> list[int]:
  found = [i for i, name in enumerate(names) if where in (name, name.split('.')[0], 'all')]
  if not found:
    raise ConfigError(f'{word!r}: no router {where!r}; there are: all, {", ".join(names)}.')
  return found


def _experts(what: str, count: int, word: str) -> np.ndarray:
  found: list[int] = []
  for piece in what.split(','):
    match = re.fullmatch(r'(\d{1,6})(?:-(\d{1,6}))?', piece)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last or last >= count:
      raise ConfigError(f'{word!r}: {piece!r} must be experts up to {count - 1}, as 0,5 or 2-4.')
    found += range(first, last + 1)
  return np.array(found)


def _order(what: str, count: int, word: str) -> np.ndarray:
  if seed := re.fullmatch(r'seed(\d{1,9})', what):
    return np.random.default_rng(int(seed[1])).permutation(count).astype(np.int32)
  order = _experts(what, count, word)
  if sorted(order) != list(range(count)):
    raise ConfigError(f'{word!r} must name every expert from 0 to {count - 1} once.')
  return order.astype(np.int32)
