"""The HTTP server of one embedded engine offers SGLang's and OpenAI's endpoints to clients written for either."""
