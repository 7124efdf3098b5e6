"""The package computes what engines report about speculation, in every spelling that readers know."""
