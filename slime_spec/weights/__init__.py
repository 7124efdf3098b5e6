"""Weights on the move: the messages of a push, the trainer's side that runs it, the engine's side that receives it."""
