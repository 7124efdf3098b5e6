"""Tasks give the prompts and reward the replies."""
