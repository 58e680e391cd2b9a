"""Conversion between runs and checkpoints of other families; needs neither transformers nor a network."""
