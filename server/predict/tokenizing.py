"""Threads that prepare inputs. A call goes in pieces, and to the end of the line after each.

So a call with thousands of texts delays one with a single text by a piece, as in the batches afterwards.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from server.predict.calls import OpenCall

__all__ = ["TokenizerPool"]

log = logging.getLogger(__name__)


class TokenizerPool:
    """Calls ``prepare_piece`` until it says that nothing is left of a call."""

    def __init__(self, num_threads: int, prepare_piece: Callable[[OpenCall], bool]) -> None:
        """``prepare_piece`` returns whether more of the call is left; it raises nothing."""
        self._prepare_piece = prepare_piece
        self._line: queue.SimpleQueue[OpenCall | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"predict-tokenizer-{number}", daemon=True)
            for number in range(num_threads)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def put(self, call: OpenCall) -> None:
        """Let a call be prepared. Any thread."""
        self._line.put(call)

    def close(self) -> None:
        """Wait for the pieces that are being prepared and end the threads. Nothing is put in afterwards."""
        for _ in self._threads:
            self._line.put(None)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _run(self) -> None:
        while (call := self._line.get()) is not None:
            if self._prepare_piece(call):
                self._line.put(call)
