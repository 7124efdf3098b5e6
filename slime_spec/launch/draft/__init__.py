"""``slime-spec draft``: offline training of draft networks on the target's own replies."""
