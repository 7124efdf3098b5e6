"""The SGLang engine: real SGLang servers behind the RolloutEngine seam."""
