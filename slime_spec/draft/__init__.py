"""Draft networks: their checkpoint formats, and the plain torch modules that trainers train and engines are held to."""
