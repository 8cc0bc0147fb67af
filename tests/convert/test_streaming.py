"""Memory stays bounded, and at full size the limits of memory and speed hold."""

import threading

import numpy as np
import pytest

from convert.core.tensors import PIECE, Stored, Writable, transpose
from convert.workplace import MEMORY, Budget, Job
from scripts.benchmarks import convert_stream
from tests.convert import case


def stored(shape, unit=1):
  return Stored('x', shape, np.dtype(np.float32), None, unit)


def job(shape, target=None, unit=1):
  source = stored(shape, unit)
  return Job(source, Writable(stored(target or shape), None), transpose=target is not None)


def test_a_piece_is_small_unless_a_chunk_or_an_expert_is_larger():
  assert stored((256384, 2048)).step() * 2048 * 4 <= PIECE
  assert stored((32, 2048, 16384)).step() == 1  # an expert is 134 MB
  assert stored((4096, 2048), unit=2048).step() == 2048  # rows that share a chunk
  assert stored(()).step() == 1


def test_memory_of_a_job_does_not_grow_with_its_tensor_unless_it_is_transposed():
  assert job((256384, 2048)).memory == job((2563840, 2048)).memory <= 3 * PIECE
  expert = 2048 * 16384 * 4
  assert job((32, 2048, 16384)).memory == 3 * expert
  whole = 2048 * 256384 * 4
  assert whole < job((2048, 256384), (256384, 2048)).memory <= whole + 2 * PIECE


@pytest.mark.parametrize(('first', 'second'), [(60, 50), (500, 300)])
def test_budget_holds_what_does_not_fit_and_lets_the_rest_through(first, second):
  budget, entered = Budget(100), threading.Event()
  budget.acquire(first)
  # One that is larger than the limit runs beside the others, but a second one waits for it.
  budget.acquire(500 if first == 60 else 60)

  def wait():
    budget.acquire(second)
    entered.set()

  threading.Thread(target=wait, daemon=True).start()
  assert not entered.wait(0.05)
  budget.release(first)
  assert entered.wait(5)
  budget.acquire(50 if first == 60 else 40)


def test_transposition_in_tiles():
  for shape in ((3, 5), (16, 256), (33, 700), (2, 20, 300)):
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    y = transpose(x)
    assert y.flags.c_contiguous
    np.testing.assert_array_equal(y, x.swapaxes(-1, -2))


def test_the_generated_checkpoint_goes_through_every_direction(tmp_path):
  report = convert_stream.measure(tmp_path, case.CONFIG)
  expected = sum(x.nbytes for x in case.weights().values())
  assert {line['bytes'] for line in report.values()} == {expected}
  assert len(report) == 4
  for line in report.values():
    assert 0 < line['peak_memory_above_base'] < MEMORY
    assert line['share_of_file_copy'] > 0


@pytest.mark.slow
def test_two_gigabytes_within_600_megabytes(tmp_path):
  report = convert_stream.measure(tmp_path, convert_stream.config_of(2.0))
  for name, line in report.items():
    assert line['bytes'] > 2e9, name
    assert line['peak_memory_above_base'] < convert_stream.MEMORY_LIMIT, name
    assert line['share_of_file_copy'] >= convert_stream.SHARE_LIMIT, name
