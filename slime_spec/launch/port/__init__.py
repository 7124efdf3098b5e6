"""``slime-spec port`` reads a slime launch script, without running it, and says what it is here."""
