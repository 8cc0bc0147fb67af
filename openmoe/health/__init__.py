"""Whether a run is well: rules over its metrics, and what is done when one fires."""

from openmoe.health.rules import PRESETS, Action, HealthConfig, Measure, Rule

__all__ = ['PRESETS', 'Action', 'HealthConfig', 'Measure', 'Rule']
