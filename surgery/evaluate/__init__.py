"""Honest measurement of what came out against what went in."""
