"""The HTTP face of one embedded engine: SGLang's endpoints and wire shapes, for clients written for SGLang."""
