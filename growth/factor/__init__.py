"""Linear maps as products of smaller ones, and back."""
