"""Ways for an engine's tensors to reach its own SGLang server; one file each."""
