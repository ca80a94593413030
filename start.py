"""What both scripts do before they import the libraries, which takes seconds and is not silent."""

import logging
import os
import signal
import sys
from pathlib import Path


def say_stopped(number: int, hint: str) -> None:
    sys.stderr.write(f"{Path(sys.argv[0]).name}: stopped by {signal.Signals(number).name}; {hint}\n")


def as_script(hint: str) -> None:
    """From here on Ctrl-C ends the process in one line, and bitsandbytes, which peft imports, speaks of errors alone:
    it asks for a package that is not needed, and says at every layer that it casts."""

    def leave(number, frame):
        say_stopped(number, hint)
        os._exit(128 + number)  # some imports, numpy's for one, go on after an exception

    signal.signal(signal.SIGINT, leave)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
