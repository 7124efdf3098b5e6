"""``slime-spec draft`` trains draft networks offline on the target's own replies."""
