"""Weights on the move: what is sent (manifest), how (push messages), and the proof that it arrived (checksums)."""
