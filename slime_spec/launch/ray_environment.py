"""What Ray must find in the environment, set before it is first imported."""

import os
from pathlib import Path

TOKEN_FILE = Path.home() / ".ray" / "auth_token"


def prepare_ray_environment(joining: bool) -> None:
    """A private Ray demands a token (Ray makes one); joining, we offer the one there is, which Ray alone would not.

    Variables that are already set win.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not joining or TOKEN_FILE.exists() or "RAY_AUTH_TOKEN" in os.environ:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
