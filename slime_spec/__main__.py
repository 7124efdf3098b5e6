"""``python -m slime_spec`` is the command ``slime-spec``."""

import sys

from slime_spec.launch.cli import main

sys.exit(main())
