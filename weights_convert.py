"""``python weights_convert.py SOURCE OUT``: a published checkpoint into one MLX folder, as ``wan-mlx convert`` does."""

import sys

from wan_mlx import generate


def main(argv: list[str] | None = None) -> int:
    return generate.main(["convert", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
