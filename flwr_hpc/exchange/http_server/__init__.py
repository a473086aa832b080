"""The server's half of the exchange over HTTP: payloads for sites that share no file system."""

from flwr_hpc.exchange.http_server.app import exchange_app as exchange_app
from flwr_hpc.exchange.http_server.uploads import Limits as Limits
