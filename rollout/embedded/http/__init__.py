"""The HTTP server of one embedded engine offers SGLang's endpoints and wire format to clients written for SGLang."""
