"""Offline training of draft networks: token sequences in, a checkpoint that engines load out."""
