"""`python -m bmtk` is the `bmtk` command."""

import sys

from bmtk_cli import main

if __name__ == "__main__":
    sys.exit(main())
