"""``python weights_convert.py SOURCE OUT``: a published checkpoint into one MLX folder, as ``wan-mlx convert`` does."""

import sys

from wan_mlx.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
