"""Offline training makes, from token sequences, a draft checkpoint that engines load."""
