"""SIGINT and SIGTERM as a request to stop after the current step."""

import signal
import threading
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """While entered, remembers the first SIGINT or SIGTERM instead of dying from it.

    A second SIGINT raises KeyboardInterrupt, for whoever won't wait for the checkpoint. Outside the main
    thread signals cannot be handled, and nothing is installed.

    Attributes:
        number: the signal received, or 0.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.number == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.number = self.number or number
