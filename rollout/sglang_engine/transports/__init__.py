"""Each transport carries an engine's tensors to its own SGLang server; each has one file."""
