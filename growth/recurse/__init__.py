"""Recursion: many layers that run through few blocks, tied on disk and in memory."""
