"""OpenMoE inside t5x: our decoders, batches and mesh for t5x's own train, eval and infer.

Nothing here imports this package. t5x is a checkout of its own; gin/t5x/ has the configurations and
README.md the commands.
"""
