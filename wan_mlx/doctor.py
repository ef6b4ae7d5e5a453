"""``python -m wan_mlx.doctor``: checks of this machine and its packages, the same as ``wan-mlx doctor``."""

import sys

from .generate import main

if __name__ == "__main__":
    sys.exit(main(["doctor", *sys.argv[1:]]))
