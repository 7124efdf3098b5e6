"""slime's flags that are no settings here: each is refused, has no effect, or sets something together with others."""
