"""OpenMoE: decoder-only mixture-of-experts language models in JAX and Flax.

Importing the package runs no work and pulls in neither TensorFlow nor torch.
"""
