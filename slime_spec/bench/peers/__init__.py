"""Other engines on the same machine, each in an environment and a process of its own; never dependencies."""
