"""A quick test for a server, since the libraries that ask it try again for minutes."""

import socket
from urllib.parse import urlparse


def responds(url: str, seconds: float) -> bool:
    """Return whether the server of a URL accepts a direct connection within some seconds."""
    host = urlparse(url)
    try:
        socket.create_connection((host.hostname or "", host.port or 443), timeout=seconds).close()
    except OSError:
        return False
    return True
