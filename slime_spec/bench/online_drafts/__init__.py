"""Runs of the main job whose drafts stay as they are, learn beside the policy, or begin untrained."""
