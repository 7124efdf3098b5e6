"""One typed configuration tree: its settings, the checks among them, and its way from and to plain data."""
