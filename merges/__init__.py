"""Merge methods: one small file each."""
