"""A tiny model of each architecture in all its forms, and what the conversion tests share."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys

import numpy as np
from etils import epath

from convert import sizes
from convert.__main__ import main
from convert.core.names import name_table
from convert.core.source import model_shapes
from convert.core.tensors import Stored
from convert.formats.ours import OursSink
from convert.run import Options, convert, find_form
from openmoe.checkpoint.description import model_fields
from openmoe.config import (
  CapacityConvention,
  Dispatch,
  ModelConfig,
  MoEConfig,
  Remat,
  RouterLoss,
  RouterOrder,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / 'tests' / 'golden'
# heads * head_dim equals embed_dim, so that attention kernels are square and a transposition of
# one changes no shape.
CONFIG = ModelConfig(
  name='tiny',
  vocab_size=64,
  num_layers=4,
  embed_dim=32,
  mlp_dim=48,
  num_heads=2,
  head_dim=16,
  num_sparse_layers=2,
  moe=MoEConfig(num_experts=4),
  dtype='float32',
)
JETMOE = sizes.of_told(
  {
    'name': 'tiny_jetmoe',
    'architecture': 'jetmoe',
    'vocab_size': 64,
    'num_layers': 3,
    'num_sparse_layers': 3,
    'embed_dim': 32,
    'mlp_dim': 24,
    'num_heads': 2,
    'head_dim': 16,
    'num_experts': 4,
    'model': {'dtype': 'float32'},
  },
  'tests',
)
STEP = 7
# Values of every field that does not shape a parameter, none of them the default.
COMPUTED = {
  'dtype': 'float32',
  'dropout_rate': 0.125,
  'init_scale': 0.3,
  'init_std': 0.2,
  'rope_theta': 5000.0,
  'norm_epsilon': 1e-3,
  'final_norm_epsilon': 1e-2,
  'float32_attention': True,
  'remat': Remat.FULL,
  'vocab_block': 128,
  'logit_z_weight': 0.5,
}
ROUTED = {
  'top_k': 3,
  'group_size': 512,
  'capacity_factor': 2.5,
  'eval_capacity_factor': 3.0,
  'min_expert_capacity': 7,
  'capacity_convention': CapacityConvention.COLOSSALAI,
  'router_order': RouterOrder.TOP_K_SOFTMAX,
  'load_balance_weight': 0.5,
  'router_z_weight': 0.25,
  'router_loss': RouterLoss.SUM,
  'balance_loss': 'megablocks',
  'router_init_std': 0.7,
  'jitter_noise': 0.01,
  'ignore_padding': True,
  'dispatch': Dispatch.MASK,
}
SHAPES = {'name', 'vocab_size', 'num_layers', 'embed_dim', 'mlp_dim', 'num_heads', 'head_dim'}
SHAPES |= {'num_sparse_layers', 'moe', 'architecture'}


def unusual() -> ModelConfig:
  """CONFIG, every other field changed."""
  moe = dataclasses.replace(CONFIG.moe, **ROUTED)
  return dataclasses.replace(CONFIG, moe=moe, **COMPUTED)


@functools.cache
def weights(config=CONFIG) -> dict[str, np.ndarray]:
  """Random float32 parameters by name of their row, in the common layout."""
  generator = np.random.default_rng(0)
  shapes = model_shapes(config)
  return {n: generator.standard_normal(s, np.float32) * np.float32(0.2) for n, s in shapes.items()}


def write_ours(path: pathlib.Path, tensors=None, step: int = STEP, config=CONFIG) -> pathlib.Path:
  """A checkpoint of ours with these tensors (default: weights()); returns its run directory."""
  tensors = weights(config) if tensors is None else tensors
  sink = OursSink(epath.Path(path) / f'checkpoint_{step}', step, {})
  stored = {n: Stored(n, x.shape, x.dtype, lambda a, b, x=x: x[a:b]) for n, x in tensors.items()}
  sink.prepare(config, stored, next(iter(tensors.values())).dtype)
  for row in name_table(config):
    sink.parameter(row).write(0, tensors[row.name])
  sink.finish()
  return path


def model_file(path: pathlib.Path, config=CONFIG) -> str:
  path.write_text(json.dumps(model_fields(config)))
  return str(path)


def loaded(path: pathlib.Path, config=CONFIG) -> dict[str, np.ndarray]:
  """All parameters of a checkpoint in the common layout, by name of their row."""
  form = find_form(path)
  return {row.name: np.array(form.load(row)) for row in name_table(config)}


def run_convert(source, kind: str, out, **options) -> pathlib.Path:
  return pathlib.Path(convert(find_form(source), kind, out, None, Options(**options)).path)


def contents(path: pathlib.Path) -> dict[str, bytes]:
  """All files below a directory."""
  return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob('*') if p.is_file()}


def cli(*args, expect: int = 0) -> str:
  """Output of the command line, run in this process."""
  import io

  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = main([str(a) for a in args])
  text = out.getvalue() + err.getvalue()
  assert code == expect, text
  return text


def start_cli(*args) -> subprocess.Popen:
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  command = [sys.executable, '-m', 'convert', *map(str, args)]
  return subprocess.Popen(
    command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
  )


# --- changes to a Hugging Face folder


def read_file(path: pathlib.Path) -> tuple[dict, bytearray]:
  """Header and tensor bytes of a safetensors file, by the format's definition."""
  content = path.read_bytes()
  (length,) = struct.unpack('<Q', content[:8])
  return json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])


def write_file(path: pathlib.Path, header: dict, data: bytes) -> None:
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  path.write_bytes(struct.pack('<Q', len(text)) + text + data)


def edit_tensor(folder: pathlib.Path, name: str, change) -> None:
  """Replaces one tensor of model.safetensors by change(tensor)."""
  path = folder / 'model.safetensors'
  header, data = read_file(path)
  begin, end = header[name]['data_offsets']
  old = np.frombuffer(bytes(data[begin:end]), np.float32).reshape(header[name]['shape'])
  new = np.ascontiguousarray(change(old.copy()), np.float32)
  assert new.shape == old.shape
  data[begin:end] = new.tobytes()
  write_file(path, header, bytes(data))


def copy(source: pathlib.Path, target: pathlib.Path, receipt: bool = False) -> pathlib.Path:
  """A copy of a folder; without receipt nothing tells what its tensors were."""
  shutil.copytree(source, target)
  if not receipt:
    (target / 'conversion_receipt.json').unlink(missing_ok=True)
  return target
