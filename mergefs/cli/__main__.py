"""``python -m mergefs.cli``."""

import sys

from mergefs.cli import main

sys.exit(main())
