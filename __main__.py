"""`python -m tokenyard` is the console script."""

import sys

from .launch.main import main

if __name__ == "__main__":
    sys.exit(main())
