"""A stand-in for the framework, with its names and signatures, for tests of hooks."""
