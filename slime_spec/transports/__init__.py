"""Ways for a push's tensors to travel; each file holds both ends."""
