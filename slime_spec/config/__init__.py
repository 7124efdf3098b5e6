"""The typed configuration tree and its checks; nothing below `slime_spec.launch` knows where the values came from."""
