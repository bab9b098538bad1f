"""The vocabulary's size and tokens: extended, trimmed, taken from another model, padded."""
