"""The same without TLS, to the near end of an SSH tunnel on this host."""

from __future__ import annotations

import logging

from flwr_hpc.exchange.stores.https import HttpsStore

log = logging.getLogger("flwr_hpc")


class HttpStore(HttpsStore):
    """A server's store behind ``http://localhost:port``, where a tunnel keeps it secret.

    Takes what `HttpsStore` takes.
    """

    def check(self) -> None:
        super().check()
        log.warning("%s: no TLS; an SSH tunnel must keep payloads and credential secret", self.url)
