"""``python -m wan_mlx.generate``: the command line, as the official ``generate.py`` is called."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
