"""Devices that a run may be on: arithmetic, memory and links, from their makers' pages."""

from __future__ import annotations

import dataclasses

TERA, GIGA, GIB = 1e12, 1e9, 2**30


@dataclasses.dataclass(frozen=True)
class Device:
  """One JAX device: a chip, or half of one where a chip is two devices (v2, v3, Ironwood).

  Attributes:
    flops: dense bfloat16 FLOP/s.
    hbm_bytes: memory as the maker states it; compilers keep some of it for themselves.
    hbm_rate: bytes/s between memory and the cores.
    link_rate: bytes/s that a device sends through one link in one direction; for GPUs through all
      of its NVLinks together.
    links: torus dimensions that the links span, two links each; 0 for a switch.
    network_rate: bytes/s a device has beyond its slice or node; 0 where nothing is published.
    clock: cycles/s of the core, for the compiler's estimates; 0 where unknown.
    fp8_flops: dense 8-bit floating point; 0 where there is none.
  """

  flops: float
  hbm_bytes: float = 0.0
  hbm_rate: float = 0.0
  link_rate: float = 0.0
  links: int = 0
  network_rate: float = 0.0
  clock: float = 0.0
  fp8_flops: float = 0.0


def _device(tera: float, gib: float, rate: float, link: float, links: int, **more) -> Device:
  """TFLOP/s, GiB, and GB/s of memory and of a link."""
  return Device(tera * TERA, gib * GIB, rate * GIGA, link * GIGA, links, **more)


# Kinds as jax.Device.device_kind has them.
# Arithmetic, memory and links: Google Cloud's TPU pages (v2 45 TFLOP/s and 16 GB a chip, v3 123
# and 32, v4 275 and 32, v5e 197 and 16, v5p 459 and 95, v6e 918 and 32, Ironwood 2,307 and 192).
# They state the sum of a chip's links in one direction (v4 2,400 Gb/s, v5e 1,600, v5p 4,800, v6e
# 3,200, Ironwood 4,800 of 9,600); a link is that over the number of links, four or six. Those of v2
# and v3 (4 links of 496 and 656 Gb/s) are of "A domain-specific supercomputer for training deep
# neural networks" (2020). Network rates are those of a chip in "How to scale your model" (2025),
# clocks of v2 to v4 of "TPU v4" (ISCA 2023); those of v5e and v5p follow from the peak and the
# matrix units. Of v6e and Ironwood none is published: theirs are such that a product of 8192 cubed,
# by the compiler's cycles, reaches 90 % of the peak, as it does on v4, v5e and v5p (88 to 93 %).
_V5E = _device(197, 16, 819, 50, 2, network_rate=3.125e9, clock=1.5e9)
_V5P = _device(459, 95, 2765, 100, 3, network_rate=6.25e9, clock=1.75e9)
_V6E = _device(918, 32, 1640, 100, 2, network_rate=12.5e9, clock=2.24e9)
_TPU = {
  'TPU v2': _device(22.5, 8, 350, 31, 2, clock=0.7e9),
  'TPU v3': _device(61.5, 16, 450, 41, 2, clock=0.94e9),
  'TPU v4': _device(275, 32, 1228, 50, 3, network_rate=6.25e9, clock=1.05e9),
  'TPU v5 lite': _V5E,
  'TPU v5e': _V5E,
  'TPU v5': _V5P,
  'TPU v5p': _V5P,
  'TPU v6 lite': _V6E,
  'TPU v6e': _V6E,
  # Half a chip; half of the chip's links for each.
  'TPU7x': _device(1153.5, 96, 3690, 50, 3, network_rate=6.25e9, clock=2.46e9, fp8_flops=2307e12),
}
# The makers' data sheets, dense (half of the "with sparsity" figures printed there). For GPUs the
# longest key that the kind contains counts. Networks are one 400 Gb/s adapter a GPU, 800 for GB300.
_NETWORK = {'network_rate': 50e9}
_GPU = {
  'A100': _device(312, 80, 2039, 300, 0, network_rate=25e9),
  'H100': _device(989.4, 80, 3350, 450, 0, fp8_flops=1979e12, **_NETWORK),
  'H100 PCIe': _device(756, 80, 2000, 300, 0, fp8_flops=1513e12, **_NETWORK),
  'H100 NVL': _device(835, 94, 3900, 300, 0, fp8_flops=1671e12, **_NETWORK),
  'H200': _device(989.4, 141e9 / GIB, 4800, 450, 0, fp8_flops=1979e12, **_NETWORK),
  'H200 NVL': _device(835, 141e9 / GIB, 4800, 450, 0, fp8_flops=1671e12, **_NETWORK),
  'B200': _device(2250, 180e9 / GIB, 7700, 900, 0, fp8_flops=4500e12, **_NETWORK),
  'GB200': _device(2500, 186e9 / GIB, 8000, 900, 0, fp8_flops=5000e12, **_NETWORK),
  'GB300': _device(2500, 279e9 / GIB, 8000, 900, 0, fp8_flops=5000e12, network_rate=100e9),
  'MI300X': _device(1307.4, 192e9 / GIB, 5300, 448, 0, fp8_flops=2614.9e12, **_NETWORK),
}
GPU_KINDS = tuple(_GPU)


def device(device_kind: str) -> Device | None:
  """What is published of a kind of device, or None.

  >>> device('TPU v5 lite').hbm_bytes / GIB
  16.0
  """
  if device_kind in _TPU:
    return _TPU[device_kind]
  matches = [key for key in _GPU if key in device_kind]
  return _GPU[max(matches, key=len)] if matches else None


def peak_flops(device_kind: str) -> float | None:
  """Dense bfloat16 FLOP/s of one device, or None for a kind without a published figure.

  >>> peak_flops('NVIDIA H100 80GB HBM3')
  989400000000000.0
  >>> peak_flops('cpu') is None
  True
  """
  known = device(device_kind)
  return None if known is None else known.flops
