"""Measurements against the physical limit and the peer; run as ``python -m benchmarks.stack``."""
