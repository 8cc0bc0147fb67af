"""Counts the matrix-product FLOPs that a function executes, by running it.

XLA's own count takes the body of a loop once, however often it runs; here loops with a trip count
that depends on data count as often as they do run.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jax.extend import core


def executed_flops(fn: Callable, *args) -> float:
  """2 x multiply-adds of all dot_general that fn(*args) executes."""
  closed = jax.make_jaxpr(fn)(*args)
  _, flops = _run(closed.jaxpr, closed.consts, jax.tree.leaves(args))
  return flops


def _dot_flops(eqn) -> float:
  lhs = eqn.invars[0].aval.shape
  (contract, _), _ = eqn.params['dimension_numbers']
  return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contract)


def _has_dots(jaxpr) -> bool:
  return any(
    eqn.primitive.name == 'dot_general'
    or any(_has_dots(sub.jaxpr) for sub in eqn.params.values() if isinstance(sub, core.ClosedJaxpr))
    for eqn in jaxpr.eqns
  )


def _inner(eqn) -> core.ClosedJaxpr | None:
  """The program of an equation that only calls one."""
  for key in ('jaxpr', 'call_jaxpr', 'fun_jaxpr'):
    inner = eqn.params.get(key)
    if isinstance(inner, core.ClosedJaxpr) and eqn.primitive.name not in ('scan', 'while', 'cond'):
      return inner
  return None


def _run(jaxpr, consts, args) -> tuple[list, float]:
  """Outputs and FLOPs of one program."""
  env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
  read = lambda v: v.val if isinstance(v, core.Literal) else env[v]
  flops = 0.0
  for eqn in jaxpr.eqns:
    values = [read(v) for v in eqn.invars]
    if eqn.primitive.name == 'while':
      outputs, more = _while(eqn, values)
    elif (inner := _inner(eqn)) is not None:
      outputs, more = _run(inner.jaxpr, inner.consts, values)
    else:
      more = _dot_flops(eqn) if eqn.primitive.name == 'dot_general' else 0.0
      subprograms = [p for p in eqn.params.values() if isinstance(p, core.ClosedJaxpr)]
      if any(_has_dots(sub.jaxpr) for sub in subprograms):
        raise NotImplementedError(f'Matrix products inside {eqn.primitive.name} are not counted.')
      outputs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
      outputs = outputs if eqn.primitive.multiple_results else [outputs]
    flops += more
    env.update(zip(eqn.outvars, outputs, strict=True))
  return [read(v) for v in jaxpr.outvars], flops


def _while(eqn, values) -> tuple[list, float]:
  body, cond = eqn.params['body_jaxpr'], eqn.params['cond_jaxpr']
  split = eqn.params['cond_nconsts'], eqn.params['cond_nconsts'] + eqn.params['body_nconsts']
  cond_consts, body_consts, carry = values[: split[0]], values[split[0] : split[1]], None
  carry, flops = values[split[1] :], 0.0
  while bool(_run(cond.jaxpr, cond.consts, [*cond_consts, *carry])[0][0]):
    carry, more = _run(body.jaxpr, body.consts, [*body_consts, *carry])
    flops += more
  return carry, flops
