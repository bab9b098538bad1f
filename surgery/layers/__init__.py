"""What a config says of each layer, and how that moves when layers do."""
