"""A program whose transfers can be counted by hand, and how its golden text is made.

  TPU_LIBRARY_PATH=.../libtpu.so JAX_PLATFORMS=cpu ... python -m tests.pods.small FILE

Three times, on a mesh of data 2, expert 2 and model 2: gathers [256, 512] bfloat16 over data, sums
[64, 512] float32 over model, exchanges [8, 128] float32 over expert; then one sum over everything.
"""

import gzip
import re
import sys

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from openmoe import partitioning
from openmoe.config import MeshConfig
from openmoe.pods.target import Target

LOOPS = 3


def body(w_dm, x_td, y_em):
  """One device's part."""

  def step(carry, _):
    x, y = carry
    whole = jax.lax.all_gather(w_dm.astype(jnp.bfloat16), 'data', axis=0, tiled=True)
    h = jax.lax.psum((x.astype(jnp.bfloat16) @ whole).astype(jnp.float32), 'model')
    y = jax.lax.all_to_all(jnp.sin(y), 'expert', split_axis=0, concat_axis=0, tiled=True)
    return (jnp.tanh(h[:, :256]) + x, y), None

  (x, y), _ = jax.lax.scan(step, (x_td, y_em), None, length=LOOPS)
  return jax.lax.psum(jnp.sum(x) + jnp.sum(y), ('data', 'expert', 'model'))


def compiled_text() -> str:
  """The program for eight v5e chips; only in a process that may load libtpu."""
  mesh = partitioning.make_mesh(MeshConfig(2, 2), Target('v5e:2x4').devices())
  local = lambda shape: jax.ShapeDtypeStruct(shape, 'float32')
  fn = jax.shard_map(
    body, mesh=mesh, in_specs=(P('data'), P(), P()), out_specs=P(), check_vma=False
  )
  arguments = local((256, 512)), local((64, 256)), local((8, 128))
  text = jax.jit(fn).lower(*arguments).compile().as_text()
  # Tables of files and lines are of this machine, and nothing reads them.
  return re.sub(r'\n(FileNames|FunctionNames|FileLocations|StackFrames)\n(\d+ .*\n)*', '\n', text)


if __name__ == '__main__':
  with gzip.open(sys.argv[1], 'wb') as file:
    file.write(compiled_text().encode())
