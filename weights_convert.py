"""Convert a published checkpoint into one MLX folder: ``python weights_convert.py SOURCE OUT``."""

from __future__ import annotations

import argparse
import sys
from functools import partial

from tqdm import tqdm

from wan_mlx import WanError
from wan_mlx.weights.convert import convert


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 (failure) or 2 (usage)."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("source", help="model folder: official, Diffusers', or an MLX folder")
    parser.add_argument("out", help="folder to write; must not exist")
    parser.add_argument("--dtype", default="bfloat16", help="of transformer and text encoder (default bfloat16)")
    parser.add_argument("--vae-dtype", default="float32", help="of the VAE (default float32)")
    parser.add_argument(
        "--quantize",
        metavar="MODE",
        help="keep the blocks of transformer and text encoder in few bits: q8 q6 q5 q4 q3 (q4-g32 for another group), "
        "mxfp8 mxfp4 nvfp4",
    )
    parser.add_argument("--model", help="preset whose sampling defaults to record, such as t2v-1.3B")
    args = parser.parse_args(argv)
    try:
        progress = partial(tqdm, leave=False)
        out = convert(args.source, args.out, args.dtype, args.vae_dtype, args.model, progress, args.quantize)
    except (ValueError, WanError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
