"""Functions of a user's own make samples: several turns, tools, loss masks. ``Sample`` has slime's attributes."""

from slime_spec.slime_sample import Sample

__all__ = ["Sample"]
