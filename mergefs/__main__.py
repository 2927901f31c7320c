"""``python -m mergefs``."""

import sys

from mergefs.cli import main

sys.exit(main())
