"""Model classes that travel inside the checkpoints that need them."""
