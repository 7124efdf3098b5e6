"""The package logs metrics: one table of names, one MetricLog, one file per sink."""
