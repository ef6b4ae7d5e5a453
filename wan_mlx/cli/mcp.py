"""``wan-mlx mcp``: the queue as tools for agents, by the Model Context Protocol on standard input and output."""

from __future__ import annotations

from pathlib import Path

from .flags import Parser
from .serve import check_packages

DESCRIPTION = """\
Tools for agents over the queue (Model Context Protocol on standard input and
output): submit a video, its status, its result, a plan, the models."""
EPILOG = """\
A server or `wan-mlx queue run` that works on the same library makes what is
asked for; where there is none, this command does."""


def build_parser() -> Parser:
    parser = Parser(prog="wan-mlx mcp", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("-m", "--model", metavar="NAME", default="nano", help="of requests that name none (nano)")
    parser.add_argument("--library", metavar="FOLDER", type=Path, help="folder of the videos (Movies/wan_mlx)")
    return parser


def main(argv: list[str]) -> int:
    """Answer until standard input ends."""
    args = build_parser().parse_args(argv)
    check_packages("mcp")
    from ..server.tools import serve_tools

    return serve_tools(args.library, args.model)
