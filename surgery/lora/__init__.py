"""Adapters as sources and results: fused into a base, extracted from a model, merged."""
