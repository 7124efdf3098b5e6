"""The package reads and writes Hugging Face checkpoint folders: configuration, tensor names, tensors."""
