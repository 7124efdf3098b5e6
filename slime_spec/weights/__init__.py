"""This package moves weights: the messages of a push, the trainer's side that sends it, the engines' that takes it."""
