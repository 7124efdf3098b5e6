"""Hand-written CPU kernels: C sources, their compilation at first use, and typed Python calls of the library."""
