"""Peak arithmetic speed by device kind, the denominator of model FLOP utilisation."""

from __future__ import annotations

# Dense bfloat16 FLOP/s of one JAX device, not of one chip: a v2 or v3 chip is two devices.
# TPU: Google Cloud's TPU system architecture pages (45, 123, 275, 197, 459, 918 TFLOP/s a chip).
# NVIDIA: the A100, H100 and H200 data sheets; half of the "with sparsity" figures printed there.
# Kinds as jax.Device.device_kind has them; for GPUs the longest key that the kind contains counts.
_TPU = {
  'TPU v2': 22.5e12,
  'TPU v3': 61.5e12,
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5e': 197e12,
  'TPU v5': 459e12,
  'TPU v5p': 459e12,
  'TPU v6 lite': 918e12,
  'TPU v6e': 918e12,
}
_GPU = {
  'A100': 312e12,
  'H100': 989.4e12,
  'H100 PCIe': 756e12,
  'H100 NVL': 835e12,
  'H200': 989.4e12,
  'H200 NVL': 835e12,
}


def peak_flops(device_kind: str) -> float | None:
  """Dense bfloat16 FLOP/s of one device, or None for a kind without a published figure.

  >>> peak_flops('NVIDIA H100 80GB HBM3')
  989400000000000.0
  >>> peak_flops('cpu') is None
  True
  """
  if device_kind in _TPU:
    return _TPU[device_kind]
  matches = [key for key in _GPU if key in device_kind]
  return _GPU[max(matches, key=len)] if matches else None
