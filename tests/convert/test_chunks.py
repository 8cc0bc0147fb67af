"""Plain chunk files are what TensorStore writes and reads, and damage to one is named."""

import ml_dtypes
import numpy as np
import pytest
import tensorstore

from convert.core.tensors import ConvertError
from convert.formats.chunks import plain_slice
from convert.formats.zarrays import ZarrStore

SHAPE = (2, 3, 7, 4)


def opened(path):
  spec = {'driver': 'zarr', 'kvstore': {'driver': 'file', 'path': str(path)}}
  return tensorstore.open(spec).result()


@pytest.fixture(params=[np.float32, ml_dtypes.bfloat16], ids=['float32', 'bfloat16'])
def array(request, tmp_path):
  """(values, store) of an array whose chunks of two rows do not divide its seven."""
  x = np.random.default_rng(0).standard_normal(SHAPE).astype(request.param)
  store = ZarrStore(tmp_path)
  store.create('x', SHAPE, x.dtype, 2, 2, None)
  return x, store


def test_tensorstore_reads_what_is_written_and_the_other_way_round(array):
  x, store = array
  for index in np.ndindex(SHAPE[:2]):
    target = store.writable('x', index=index)
    assert target.stored.unit == 2
    target.write(0, x[index][:4])
    target.write(4, x[index][4:])
    target.sync()
    np.testing.assert_array_equal(target.stored.read(1, 6), x[index][1:6])
  np.testing.assert_array_equal(opened(store.path / 'x').read().result(), x)
  opened(store.path / 'x')[1, 2].write(x[0, 0]).result()
  np.testing.assert_array_equal(store.stored('x', index=(1, 2)).whole(), x[0, 0])
  merged = store.stored('x', index=(0,), merge=2)
  np.testing.assert_array_equal(merged.whole(), x[0].reshape(3, 28))


def test_a_damaged_chunk_is_named(array):
  x, store = array
  target = store.writable('x', label='x[0, 1]', index=(0, 1))
  target.write(0, x[0, 1])
  chunk = store.path / 'x' / '0.1.1.0'
  chunk.write_bytes(chunk.read_bytes()[:-1])
  with pytest.raises(ConvertError, match=r'x\[0, 1\] .* cannot be read: chunk 0.1.1.0 is trunc'):
    target.stored.whole()
  chunk.unlink()
  with pytest.raises(ConvertError, match=r'chunk 0.1.1.0 is missing'):
    store.stored('x', index=(0, 1)).read(2, 3)
  np.testing.assert_array_equal(store.stored('x', index=(0, 1)).read(4, 7), x[0, 1, 4:])


def test_what_is_not_plain_is_left_to_tensorstore(tmp_path):
  store = ZarrStore(tmp_path)
  store.create('packed', (4, 4), np.dtype(np.float32), 0, 2, {'id': 'zstd', 'level': 1})
  store.create('plain', (4, 4), np.dtype(np.float32), 0, 2, None)
  assert plain_slice(tmp_path / 'packed', ()) is None
  assert plain_slice(tmp_path / 'plain', ()).unit == 2
  assert plain_slice(tmp_path / 'plain', (1,)) is None, 'its chunks hold more than this row'
