"""Draft networks are plain torch modules: trainers train them, and tests compare engines with them."""
