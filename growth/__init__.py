"""Changes of shape: one file each."""
