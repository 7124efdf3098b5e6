"""What a checkpoint folder's weight files are called; apart from the code that reads them, which needs torch."""

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
