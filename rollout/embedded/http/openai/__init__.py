"""OpenAI's endpoints: completions, chat completions and models, over the same calls as POST /generate."""
