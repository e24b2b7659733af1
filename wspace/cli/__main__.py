"""`python -m wspace.cli`, where the command is not installed."""

import sys

from wspace.cli import main

if __name__ == "__main__":
    sys.exit(main())
