"""Hugging Face checkpoint folders: configuration, tensor names, reading and writing."""
