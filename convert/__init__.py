"""Offline conversion between checkpoint formats; imports openmoe, never imported by it."""
