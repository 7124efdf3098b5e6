"""The package has the reinforcement learning loop and its pure parts: requests, advantages, batches."""
