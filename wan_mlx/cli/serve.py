"""``wan-mlx serve``: the page in the browser, and the API, over a queue that survives."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from ..errors import install_command
from ..server.machines import parse_machines
from .flags import Parser
from .terminal import write

PORT = 8190
MACHINES = "others that make videos too, by ssh: mac2,mac3; or mac2=/path/of/wan-mlx"
OF_SERVE = ("fastapi", "uvicorn", "python_multipart", "send2trash")
NEEDED = {"serve": OF_SERVE, "mcp": (*OF_SERVE, "mcp")}
DESCRIPTION = """\
Open a page in the browser on which videos are made, and an API for programs,
over one queue."""
EPILOG = """\
Only this machine can reach it. With another --host it needs a token, which is
printed; WAN_MLX_TOKEN sets one.

examples:
  wan-mlx serve
  wan-mlx serve --model t2v-1.3B --library ~/Movies/wan
  wan-mlx serve --host 0.0.0.0 --no-browser"""


def build_parser() -> Parser:
    parser = Parser(prog="wan-mlx serve", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("-m", "--model", metavar="NAME", default="nano", help="of requests that name none (nano)")
    parser.add_argument("--port", metavar="N", type=int, default=PORT, help=f"port ({PORT}); 0: any that is free")
    parser.add_argument("--host", metavar="ADDRESS", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    parser.add_argument("--library", metavar="FOLDER", type=Path, help="folder of the videos (Movies/wan_mlx)")
    parser.add_argument("--machines", metavar="LIST", help=MACHINES)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # at the other end of ssh
    parser.add_argument("--no-browser", action="store_true", help="do not open the browser")
    return parser


def check_packages(command: str) -> None:
    """Raise ImportError, in one line that says how to install them, if packages of the command's extra are missing."""
    if missing := [name.replace("_", "-") for name in NEEDED[command] if importlib.util.find_spec(name) is None]:
        raise ImportError(f"`{command}` needs {', '.join(missing)}: {install_command(*missing)}")


def main(argv: list[str]) -> int:
    """Serve until Ctrl-C."""
    args = build_parser().parse_args(argv)
    if args.worker:
        from ..server.remote_worker import main as work  # with MLX

        return work()
    machines = parse_machines(args.machines)
    check_packages("serve")
    from ..server.serving import Serving

    serving = Serving(args.host, args.port, args.library, args.model, machines)
    write(serving.address)
    return serving.run(opens_browser=not args.no_browser)
