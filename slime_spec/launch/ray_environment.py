"""Set the environment variables of Ray, before Ray is first imported."""

import os
from pathlib import Path

TOKEN_FILE = Path.home() / ".ray" / "auth_token"


def prepare_ray_environment(joining: bool) -> None:
    """Demand a token in a private Ray (Ray makes the token); to a joined Ray, offer the existing token, if any.

    Variables that are already set win.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not joining or TOKEN_FILE.exists() or "RAY_AUTH_TOKEN" in os.environ:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
