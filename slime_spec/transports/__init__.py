"""A transport carries a push's tensors; each file holds both ends of a transport."""
