"""The embedded engine is a lean pure-torch forward with continuous batching, shared prompts and exact speculation."""
