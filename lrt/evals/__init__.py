"""Evaluation: every number through `decode` or `fold`, and every number with its mode."""
