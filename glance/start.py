"""What does every script do before it imports the libraries, which takes seconds and is not silent?

Only the standard library and command_line may be imported here: --help and a mistyped flag are answered by them.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from glance.command_line import Settings, is_first_process, say_error


def say_stopped(number: int, hint: str) -> None:
    """Write in one line which signal ended the script, and the hint."""
    sys.stderr.write(f"{Path(sys.argv[0]).name}: stopped by {signal.Signals(number).name}; {hint}\n")


def as_script(hint: str, parse: Callable[[], Settings] | None = None) -> Settings | None:
    """Return the settings that `parse` reads off the command line; --help or a mistake there ends the process at once.

    From here on Ctrl-C ends it in one line, with this hint, and the libraries log errors only. Otherwise bitsandbytes,
    which peft imports, asks for a package that is not needed and reports every layer that it casts, and transformers
    asks for torchvision while it is imported.
    """

    def leave(number, frame):
        if is_first_process():
            say_stopped(number, hint)
        os._exit(128 + number)  # some imports, numpy's for one, go on after an exception

    signal.signal(signal.SIGINT, leave)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DELAY", "1")  # of what takes a second, no bar is needed
    if sys.stdout:  # a caption that the terminal cannot show ends no run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return parse() if parse else None
    except argparse.ArgumentError as error:
        say_error(error)
        sys.exit(2)
