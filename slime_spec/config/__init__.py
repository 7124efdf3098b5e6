"""The package has one typed configuration tree: its settings, the checks among them, its way from and to plain data."""
