"""Weights that others released, turned into checkpoints of this package; one module per source."""
