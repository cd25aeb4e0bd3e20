"""``python -m opta_lmx`` is the command ``opta-lmx``."""

import sys

from opta_lmx.cli import main

if __name__ == "__main__":
    sys.exit(main())
