"""The composition root: command line, Hydra, and the only place that may import all three packages."""
