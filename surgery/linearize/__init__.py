"""Softmax attention to linear attention."""
