"""Models: the same layers and one interface (see openmoe.models.openmoe.ModelOutput)."""

from openmoe.models.openmoe import ModelOutput, OpenMoE

__all__ = ['ModelOutput', 'OpenMoE']
