"""What every script does before it imports the libraries, which takes seconds and is not silent."""

import logging
import os
import signal
import sys
from pathlib import Path


def say_stopped(number: int, hint: str) -> None:
    sys.stderr.write(f"{Path(sys.argv[0]).name}: stopped by {signal.Signals(number).name}; {hint}\n")


def as_script(hint: str) -> None:
    """From here on Ctrl-C ends the process in one line, and the libraries speak of errors alone: bitsandbytes, which
    peft imports, asks for a package that is not needed, and says at every layer that it casts; transformers asks for
    torchvision while it is imported."""

    def leave(number, frame):
        say_stopped(number, hint)
        os._exit(128 + number)  # some imports, numpy's for one, go on after an exception

    signal.signal(signal.SIGINT, leave)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
