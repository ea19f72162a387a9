"""``python -m petl``."""

import sys

from petl.cli import main

sys.exit(main())
