"""`python -m residual_steer` is the command `residual-steer`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
