"""``python -m wan_mlx.generate``: the command line, as the official ``generate.py`` is called."""

import signal
import sys


def main(argv: list[str] | None = None) -> int:
    """Run the command line; until it is imported, and can say so in words, Ctrl-C ends the process without any."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli.main import main as command

    signal.signal(signal.SIGINT, before)
    return command(argv)


if __name__ == "__main__":
    sys.exit(main())
