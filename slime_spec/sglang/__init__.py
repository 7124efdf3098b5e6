"""What is known of SGLang without running it: its flags, its releases, its metadata, its rules for a draft's shape."""
