"""The package knows SGLang without running it: flags, releases, metadata, and rules for a draft's shape."""
