"""The setting names of other trainers, verl's and TRL's: each has a flag here, or none for a reason."""
