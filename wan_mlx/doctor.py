"""``python -m wan_mlx.doctor``: checks of this machine and its packages, the same as ``wan-mlx doctor``."""

import sys

from .cli.doctor import main

if __name__ == "__main__":
    sys.exit(main())
