"""The SGLang engine runs real SGLang servers behind the RolloutEngine interface."""
