"""The bench: checkpoints in, a plan, a checkpoint out."""
