"""The plug-in gives unmodified SGLang servers draft-safe weight updates; it loads in their processes, so it imports nothing heavy."""
