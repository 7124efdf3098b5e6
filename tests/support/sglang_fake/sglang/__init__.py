"""On PYTHONPATH of an engine's server: "python -m sglang.launch_server" then starts the fake."""
