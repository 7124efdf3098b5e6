"""Speculation as numbers: what engines report about it, in every spelling that readers know."""
