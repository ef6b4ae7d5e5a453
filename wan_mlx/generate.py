"""``python -m wan_mlx.generate``: the command line, as the official ``generate.py`` is called."""

import signal
import sys
import threading


def main(argv: list[str] | None = None) -> int:
    """Run the command line; until it is imported, and can say so in words, Ctrl-C ends the process without any."""
    is_python_s = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    quietly = is_python_s and threading.current_thread() is threading.main_thread()
    if quietly:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli.main import main as command

    if quietly:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return command(argv)


if __name__ == "__main__":
    sys.exit(main())
