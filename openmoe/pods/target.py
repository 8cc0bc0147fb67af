"""The machine that a run is planned for: its name, its devices, and the mesh over them."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh

from openmoe import partitioning
from openmoe.config import ConfigError, MeshConfig
from openmoe.observe import hardware

# Name -> (device kind, devices of a chip, torus dimensions).
_TPUS = {
  'v2': ('TPU v2', 2, 2),
  'v3': ('TPU v3', 2, 2),
  'v4': ('TPU v4', 1, 3),
  'v5e': ('TPU v5 lite', 1, 2),
  'v5p': ('TPU v5', 1, 3),
  'v6e': ('TPU v6 lite', 1, 2),
  'tpu7x': ('TPU7x', 2, 3),
}
_ALIASES = {'ironwood': 'tpu7x', 'v5litepod': 'v5e'}
_LARGEST = 16384  # chips; more than any slice that can be had


@dataclasses.dataclass(frozen=True)
class Target:
  """A machine by name.

  Attributes:
    topology: 'v5p:4x8x8', a TPU slice of 4 x 8 x 8 chips, or 'H100:32x8', 32 nodes of 8 GPUs.
    slices: so many TPU slices of this kind, joined by the network of the data centre.
  """

  topology: str
  slices: int = 1

  def __post_init__(self):
    name, _, sides = self.topology.partition(':')
    gpus = {kind.lower(): kind for kind in hardware.GPU_KINDS}
    name = _ALIASES.get(name.lower(), name.lower())
    if name not in _TPUS and name not in gpus:
      near = difflib.get_close_matches(name, [*_TPUS, *gpus], n=1)
      hint = f' Did you mean {gpus.get(near[0], near[0])!r}?' if near else ''
      raise ConfigError(
        f'--topology={self.topology} names no known machine; give one of '
        f'{[*_TPUS, *gpus.values()]} with its size, as v5p:4x8x8 or H100:32x8.{hint}'
      )
    whole = re.fullmatch(r'\d{1,5}(x\d{1,5}){0,2}', sides)
    if not whole or not 1 <= math.prod(map(int, sides.split('x'))) <= _LARGEST:
      raise ConfigError(
        f'--topology={self.topology} needs its size in chips behind the colon, of 1 to {_LARGEST}, '
        'as v5p:4x8x8 or H100:32x8.'
      )
    rank = sides.count('x') + 1
    if name in _TPUS and rank != _TPUS[name][2]:
      raise ConfigError(
        f'--topology={self.topology}: a slice of {name} has {_TPUS[name][2]} sides, not {rank}; '
        f'write {name}:{"x".join("4" * _TPUS[name][2])} for one of {4 ** _TPUS[name][2]} chips.'
      )
    if name not in _TPUS and self.slices > 1:
      raise ConfigError(f'--slices={self.slices} is of TPUs; for GPUs give more nodes.')
    object.__setattr__(self, 'topology', f'{gpus.get(name, name)}:{sides}')

  @property
  def kind(self) -> str:
    """As jax.Device.device_kind has it."""
    name = self.topology.partition(':')[0]
    return _TPUS[name][0] if name in _TPUS else f'NVIDIA {name}'

  @property
  def is_tpu(self) -> bool:
    return self.topology.partition(':')[0] in _TPUS

  @property
  def sides(self) -> tuple[int, ...]:
    return tuple(int(n) for n in self.topology.partition(':')[2].split('x'))

  @property
  def device_count(self) -> int:
    name = self.topology.partition(':')[0]
    return math.prod(self.sides) * self.slices * (_TPUS[name][1] if name in _TPUS else 1)

  @property
  def device(self) -> hardware.Device:
    return hardware.device(self.kind)

  def __str__(self) -> str:
    return self.topology if self.slices == 1 else f'{self.slices} x {self.topology}'

  def abstract_mesh(self, mesh: MeshConfig) -> AbstractMesh:
    """The mesh with the kind of its devices and none of them; for tracing.

    Raises:
      ConfigError: the partitions do not divide the devices.
    """
    platform = 'tpu' if self.is_tpu else 'gpu'
    return AbstractMesh(
      partitioning.mesh_shape(mesh, self.device_count),
      partitioning.MESH_AXES,
      axis_types=(jax.sharding.AxisType.Auto,) * 3,
      abstract_device=AbstractDevice(self.kind, None, platform),
    )

  def devices(self) -> Sequence[jax.Device]:
    """Devices to compile for; only in a process that may load libtpu.

    Raises:
      ConfigError: the compiler knows no such topology.
    """
    options = {}
    if self.topology.startswith('v4'):
      options['chip_config_name'] = 'megacore'
    if math.prod(self.sides) < 4:  # smaller than a host's usual share
      options['chips_per_host_bounds'] = (*self.sides, *(1,) * (3 - len(self.sides)))
    if self.slices > 1:
      options['num_slices'] = self.slices
    try:
      return topologies.get_topology_desc(
        platform='tpu', topology_name=self.topology, **options
      ).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
      raise ConfigError(
        f'--topology={self.topology} is no slice that libtpu knows ({str(error).splitlines()[0]}); '
        'sides are as v5e:4x4, v5p:4x4x8: multiples of a host of 2x2 chips.'
      ) from error
