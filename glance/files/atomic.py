"""How is a file written whole or not at all, the old one staying until the new one is there?

Whatever a run writes passes here, so the order of writing, flushing and renaming is for all of it.
"""

import contextlib
import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def replace_file(path: Path, write) -> None:
    """Call write(temporary path), then rename it to `path`: a file is either the old one or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        umask = os.umask(0)  # it can only be read by setting it
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors makes its files readable by their owner alone
        with temporary.open("r+b") as file:  # Windows flushes none that is open to read alone
            os.fsync(file.fileno())  # the name must not be there before the content, should the machine go down
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or its folder has gone
            temporary.unlink()
