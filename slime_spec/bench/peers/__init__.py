"""Peers are other engines on the same machine, each with its own environment and process; never dependencies."""
