"""Bases of a store -> a trainable model: cores, the adapted layer, attach and merge, checkpoints."""
