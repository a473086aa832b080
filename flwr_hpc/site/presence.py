"""A ClientApp's sign of life, for a server that waits for its reply."""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import replace

from flwr_hpc.spool import Answering, Spool

BEAT_S = 5.0


class Presence:
    """Says in the site's folder that a message is worked on, and that it is answered.

    A thread does the writing: a ClientApp may fetch weights for minutes.

    Parameters
    ----------
    spool : Spool
    message_id, kind : str
        Of the message.
    """

    def __init__(self, spool: Spool, message_id: str, kind: str) -> None:
        self._file = spool.answering
        self._record = Answering(message_id, kind)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="presence", daemon=True)

    def __enter__(self) -> Presence:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._record = replace(self._record, answered=True)
        self._write()

    def _beat(self) -> None:
        while not self._end.wait(BEAT_S):
            self._record = replace(self._record, beat=self._record.beat + 1)
            self._write()

    def _write(self) -> None:
        with suppress(OSError):  # the server sees for itself that nothing can be written
            self._file.write(self._record)
