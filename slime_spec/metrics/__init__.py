"""Metrics: one table of names, one door to log them through, one file per sink."""
