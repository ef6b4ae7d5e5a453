"""``wan-mlx smooth VIDEO``: any video with more frames a second, those between by RIFE."""

from __future__ import annotations

from ..errors import UsageError
from ..options import named
from ..smoothing import smooth_file
from ..weights.rife import NAME
from .flags import Parser
from .interrupt import Interrupts
from .terminal import Terminal

DESCRIPTION = """Write a video with more frames a second: RIFE makes those between its own.

The sound stays, where the new file can hold it. Over a cut between scenes
nothing is blended."""


def build_parser() -> Parser:
    parser = Parser("wan-mlx smooth cat.mp4", prog="wan-mlx smooth", description=DESCRIPTION)
    parser.add_argument("video", metavar="VIDEO", help="a video or animation: .mp4 .mov .mkv .webm .gif .webp ...")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help=".mp4 .gif .webp .png .npz (default: VIDEO's name and the rate)"
    )
    parser.add_argument("--fps", type=float, metavar="N", help="frames a second, more than it has")
    parser.add_argument("--times", type=int, metavar="N", help="or so many times its own (default 2)")
    parser.add_argument(
        "--weights", default=NAME, metavar="NAME", help="of RIFE: rife (default: 4.25, 23 MB), a file, owner/name:file"
    )
    parser.add_argument("--source", metavar="HUB", help=named("source").described)
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.add_argument("--quiet", action="store_true", help="print only the output's path and errors")
    parser.add_argument("--json", action="store_true", help="print one JSON event a line on stdout, for programs")
    return parser


def main(argv: list[str]) -> int:
    """Run the command line and return its exit code."""
    args = build_parser().parse_args(argv)
    if args.fps is not None and args.times is not None:
        raise UsageError("--fps and --times are both given; leave out one of the two")
    say, hub = Terminal(args.quiet, args.json), args.source or named("source").left_out()
    with Interrupts():
        say(smooth_file(args.video, args.output, args.fps, args.times, args.weights, args.overwrite, say, hub))
    return 0
