"""Which process of how many this is, and where the first one is met.

Asked for in turn: what the command says, variables that a launcher sets for JAX, SLURM, JobSet on
Kubernetes, and last what JAX finds of TPU VMs (GCE and GKE).
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping

from openmoe.config import ConfigError

_PORT = 8476  # of the first process, where nobody names one
# Launchers' names for (address, count, index), the most particular first.
_VARIABLES = (
  ('JAX_COORDINATOR_ADDRESS', 'JAX_PROCESS_COUNT', 'JAX_PROCESS_INDEX'),
  ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'),
  ('JAX_COORDINATOR_ADDRESS', 'NNODES', 'NODE_RANK'),
)


@dataclasses.dataclass(frozen=True)
class Place:
  """One process among others.

  Attributes:
    address: host:port where process 0 is met.
    count: of processes.
    index: of this one.
    found_by: who said so, for messages.
  """

  address: str
  count: int
  index: int
  found_by: str = 'the command'

  def __post_init__(self):
    if self.count < 1 or not 0 <= self.index < self.count:
      raise ConfigError(
        f'{self.found_by} says process {self.index} of {self.count}: indices go from 0 to one less '
        'than the count. Set --process_index and --process_count.'
      )
    host, _, port = self.address.rpartition(':')
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
      raise ConfigError(
        f'{self.found_by} names {self.address!r} as address of process 0, which is no HOST:PORT. '
        'Set --coordinator_address.'
      )

  @property
  def host(self) -> str:
    """Of process 0."""
    return self.address.rpartition(':')[0].strip('[]')

  @property
  def port(self) -> int:
    """Of process 0."""
    return int(self.address.rpartition(':')[2])


def find_place(
  address: str | None = None,
  count: int | None = None,
  index: int | None = None,
  *,
  environment: Mapping[str, str] = os.environ,
  timeout: int = 300,
) -> Place:
  """The place of this process; what is given wins over what is found.

  Args:
    environment: variables of this process.
    timeout: seconds that a name server or metadata server is waited for.

  Raises:
    ConfigError: something is wrong, or missing and found nowhere.
  """
  if None not in (address, count, index):
    return Place(address, count, index)
  for found in (_of_variables, _of_slurm, _of_jobset):
    if place := found(environment):
      break
  else:
    place = _of_jax(timeout)
  if place is None:
    raise ConfigError(
      '--multiprocess, and nothing here says where the other processes are (no TPU VM, SLURM, '
      'JobSet or JAX_COORDINATOR_ADDRESS): set --coordinator_address=HOST:PORT, --process_count '
      'and --process_index.'
    )
  given = {'address': address, 'count': count, 'index': index}
  return dataclasses.replace(place, **{k: v for k, v in given.items() if v is not None})


def _number(environment: Mapping[str, str], name: str) -> int:
  try:
    return int(environment[name])
  except ValueError as error:
    raise ConfigError(f'{name}={environment[name]!r} must be a whole number.') from error


def _of_variables(environment: Mapping[str, str]) -> Place | None:
  for address, count, index in _VARIABLES:
    if all(name in environment for name in (address, count, index)):
      where = environment[address]
      where = where if ':' in where else f'{where}:{_PORT}'
      found = f'{address}, {count} and {index}'
      return Place(where, _number(environment, count), _number(environment, index), found)
  return None


def _of_slurm(environment: Mapping[str, str]) -> Place | None:
  """srun's variables; the port follows from the job, so that two jobs of a node do not meet."""
  nodes = environment.get('SLURM_STEP_NODELIST') or environment.get('SLURM_JOB_NODELIST')
  names = ('SLURM_JOB_ID', 'SLURM_NTASKS', 'SLURM_PROCID')
  if not nodes or not all(name in environment for name in names):
    return None
  job, count, index = (_number(environment, name) for name in names)
  return Place(f'{first_node(nodes)}:{61440 + job % 4096}', count, index, 'SLURM')


def first_node(nodes: str) -> str:
  """The first host of a node list of SLURM's.

  >>> first_node('a1,b2'), first_node('gpu[003-010,12],x'), first_node('a[1]-ib')
  ('a1', 'gpu003', 'a1-ib')
  """
  found = re.fullmatch(r'([^,\[\]]+)(?:\[([^,\-\]]+)[^\]]*\]([^,\[\]]*))?(?:,.*)?', nodes.strip())
  if found is None:
    raise ConfigError(f'SLURM_STEP_NODELIST={nodes!r} is no list of nodes.')
  return ''.join(part or '' for part in found.groups())


def _of_jobset(environment: Mapping[str, str]) -> Place | None:
  """An indexed job of a JobSet, whose manifest passes on its names and the number of its pods."""
  names = ('JOBSET_NAME', 'REPLICATED_JOB_NAME', 'JOB_COMPLETION_INDEX')
  if not all(name in environment for name in names) or 'TPU_WORKER_HOSTNAMES' in environment:
    return None
  if 'JOB_PARALLELISM' not in environment:
    raise ConfigError(
      'This pod belongs to a JobSet, and JOB_PARALLELISM does not say how many pods a job has: '
      'pass spec.parallelism on as that variable, or set --process_count.'
    )
  pods = _number(environment, 'JOB_PARALLELISM')
  jobs = _number(environment, 'JOB_REPLICAS') if 'JOB_REPLICAS' in environment else 1
  job = _number(environment, 'JOB_INDEX') if 'JOB_INDEX' in environment else 0
  index = job * pods + _number(environment, 'JOB_COMPLETION_INDEX')
  jobset, replicated = environment['JOBSET_NAME'], environment['REPLICATED_JOB_NAME']
  host = f'{jobset}-{replicated}-0-0.{jobset}'  # the first pod, by the JobSet's own DNS
  return Place(f'{host}:{_PORT}', pods * jobs, index, 'JobSet')


def _of_jax(timeout: int) -> Place | None:
  """What JAX itself finds: TPU VMs, by the metadata server or by GKE's variables."""
  from jax._src import clusters  # it has no public name

  address, count, index, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
    None, None, None, [], None, timeout
  )
  if None in (address, count, index):
    return None
  return Place(str(address), int(count), int(index), 'the TPU environment')
