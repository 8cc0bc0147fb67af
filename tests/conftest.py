"""Settings of every test process, made before jax or TensorFlow is imported.

Tests run on eight simulated CPU devices, so that meshes are real; TensorFlow is kept quiet.
"""

import atexit
import os
import shutil
import sys
import tempfile

import pytest

# Compilation is most of the time of these tests, and none of them is about speed.
_DEVICES = (
  '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 '
  '--xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false '
  # A busy machine runs the devices one after the other; XLA would abort after 40 s.
  '--xla_cpu_collective_call_terminate_timeout_seconds=600 '
  '--xla_cpu_collective_timeout_seconds=600'
)

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_DEVICES}'.strip()
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
os.environ.setdefault('MPLBACKEND', 'agg')

# Runs that are killed and started again compile the same programmes again and again.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='openmoe-compiled-')
  atexit.register(shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')

# The longest files begin first: a file stays in one process, and the last to begin is waited for.
_LONGEST = (
  'tests/test_train.py',
  'tests/test_train_step.py',
  'tests/layers/test_moe.py',
  'tests/models/test_jetmoe.py',
  'tests/inference/test_decode.py',
  'tests/test_models.py',
  'tests/parity/test_flaxformer.py',
)


def pytest_collection_modifyitems(items):
  place = lambda item: item.nodeid.split('::')[0]
  items.sort(key=lambda i: _LONGEST.index(place(i)) if place(i) in _LONGEST else len(_LONGEST))


@pytest.fixture(autouse=True)
def _no_settings_left_behind():
  """No test sees what another one told gin or the flags, whatever order they run in."""
  _forget_settings()
  yield
  _forget_settings()


def _forget_settings():
  if gin := sys.modules.get('gin'):
    gin.clear_config()
  if flags := sys.modules.get('absl.flags'):
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS:
      if flags.FLAGS[name].present:
        flags.FLAGS[name].unparse()


def pytest_sessionfinish(session):
  """OPENMOE_TEST_NO_SKIPS=1 fails a run that skipped something because an extra is missing."""
  reporter = session.config.pluginmanager.get_plugin('terminalreporter')
  if os.environ.get('OPENMOE_TEST_NO_SKIPS') and reporter and reporter.stats.get('skipped'):
    session.exitstatus = 1
