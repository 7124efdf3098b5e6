"""Unmodified slime, miles and verl measure and use speculation by functions that their own flags name."""
