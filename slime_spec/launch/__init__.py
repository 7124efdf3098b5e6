"""The composition root has the command line and Hydra; only it may import all three packages."""
