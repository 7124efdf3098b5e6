"""This package has hand-written CPU kernels: C sources, their compilation at first use, and typed Python calls."""
