"""Hand-written CPU kernels: C sources, their compilation at first use, and the library behind a Python face."""
