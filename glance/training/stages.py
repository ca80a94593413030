"""How long does each stage of a run take, and how much memory at its peak?

A stage lasts until the next one is entered, so that one line at its beginning is all that the code of a run says of
it. Outside `measured`, in a test or a benchmark of a part, `enter` does nothing.
"""

import contextlib
import logging
import threading
import time
from dataclasses import dataclass

import psutil
import torch


logger = logging.getLogger(__name__)
PERIOD = 0.02  # seconds between two looks at the resident set, of which no peak is kept that could be set back


@dataclass
class Stage:
    """A part of a run; one that is entered again goes on."""

    name: str
    seconds: float = 0.0
    peak: int = 0  # bytes, of what `Measurement.memory` says


class Measurement:
    """The stages of a run on a device, in the order in which they were first entered."""

    def __init__(self, device: torch.device):
        self.device = device if device.type == "cuda" else None
        self.memory = f"allocated on {device}" if self.device else "resident set"
        self.process = psutil.Process()
        self.began = self.process.create_time()  # imports are part of what a user waits for
        self.current = Stage("starting", time.time() - self.began)
        self.stages = {"starting": self.current}
        self.since, self.done = time.perf_counter(), threading.Event()

    def look(self) -> None:
        """Note the present peak, or the present size where a device keeps no peak."""
        size = torch.cuda.max_memory_allocated(self.device) if self.device else self.process.memory_info().rss
        self.current.peak = max(self.current.peak, size)

    def watch(self) -> None:
        """Look until it is done."""
        while not self.done.wait(PERIOD):
            self.look()

    def enter(self, name: str) -> None:
        """End the present stage and begin this one."""
        self.finish()
        self.current = self.stages.setdefault(name, Stage(name))
        if self.device:
            torch.cuda.reset_peak_memory_stats(self.device)
        logger.info(name.capitalize())

    def finish(self) -> None:
        """Count the present stage until now."""
        self.look()
        now = time.perf_counter()
        self.current.seconds += now - self.since
        self.since = now

    def report(self) -> list[str]:
        """Return a line for each stage so far, seconds and peak memory."""
        self.finish()
        width = max(map(len, self.stages))
        return [f"{'':{width}}  seconds  peak GB ({self.memory})"] + [
            f"{stage.name:{width}}  {stage.seconds:7.1f}  {stage.peak / 1e9:7.2f}" for stage in self.stages.values()
        ]


_current: Measurement | None = None


@contextlib.contextmanager
def measured(device: torch.device):
    """Measure the stages that are entered inside; yield the measurement."""
    global _current
    _current = measurement = Measurement(device)
    if measurement.device is None:
        threading.Thread(target=measurement.watch, daemon=True).start()
    try:
        yield measurement
    finally:
        measurement.done.set()
        _current = None


def enter(name: str) -> None:
    """End the present stage of the run and begin this one."""
    if _current is not None:
        _current.enter(name)
