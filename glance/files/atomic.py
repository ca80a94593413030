"""A file is written whole or not at all, and an old one stays until the new one is there."""

import contextlib
import os
from pathlib import Path


def replace_file(path: Path, write) -> None:
    """Call write(temporary path), then rename it to `path`: a file is either the old one or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.umask(umask := os.umask(0))
        temporary.chmod(0o666 & ~umask)  # safetensors makes its files readable by their owner alone
        with temporary.open("r+b") as file:  # Windows flushes none that is open to read alone
            os.fsync(file.fileno())  # the name must not be there before the content, should the machine go down
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or its folder has gone
            temporary.unlink()
