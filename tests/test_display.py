"""Formats and colours of the progress display."""

import doctest
import math

import numpy as np
import pytest
from rich.console import Console

from openmoe.observe import display, hardware, metrics
from openmoe.observe.display import Progress, heat_strip, load_colour, quantity, sparkline


@pytest.mark.parametrize('module', [display, hardware, metrics])
def test_examples(module):
  assert doctest.testmod(module, extraglobs={'np': np}).failed == 0


def test_quantities_keep_their_width():
  values = [0.0, 9.994, 9.996, 99.96, 999.4, 1234.0, 99949.0, 1e6, 2.5e13, 3e17]
  assert all(len(quantity(v)) <= 5 for v in values)
  assert quantity(float('nan')) == 'nan'


def test_colours_meet_at_the_uniform_share_and_saturate():
  pale = load_colour(1.0)
  assert load_colour(0.25) == load_colour(0.0) == (33, 102, 172)
  assert load_colour(4.0) == load_colour(40.0) == (178, 24, 43)
  assert load_colour(1.001)[0] <= pale[0]
  assert math.dist(load_colour(2.0), pale) < math.dist(load_colour(4.0), pale)


def test_a_strip_has_one_cell_an_expert():
  load = np.full((2, 8), 1 / 8)
  dead = np.zeros((2, 8), bool)
  dead[1, 3] = True
  console = Console(width=80, record=True, file=open('/dev/null', 'w'))  # noqa: SIM115
  console.print(heat_strip(Progress(1, 2, expert_load=load, dead=dead, sparse_layers=(5, 11)), 40))
  first, second = console.export_text().splitlines()
  assert first.startswith('layer 5')
  assert second.startswith('layer 11')
  assert second.index('×') == len('layer 11  ') + 3 * 3 + 1
  assert '×' not in first


def test_a_loss_that_is_not_finite_shows():
  assert sparkline([2.0, float('nan'), 1.0]) == '█!▁'
  assert sparkline([]) == ''


def test_peaks_are_per_device():
  assert hardware.peak_flops('TPU v3') == 61.5e12
  assert hardware.peak_flops('TPU v5') == hardware.peak_flops('TPU v5p')
  assert hardware.peak_flops('NVIDIA H100 PCIe') < hardware.peak_flops('NVIDIA H100 80GB HBM3')
  assert hardware.peak_flops('NVIDIA A100-SXM4-80GB') == 312e12
  assert hardware.peak_flops('NVIDIA H200') == 989.4e12
  assert hardware.peak_flops('Some new accelerator') is None
