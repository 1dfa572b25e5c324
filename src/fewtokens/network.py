"""A quick test for a server, since the libraries that ask it try again for minutes."""

import socket
from urllib.parse import urlparse
from urllib.request import getproxies, proxy_bypass

PORTS = {"http": 80, "socks5": 1080, "socks5h": 1080}  # others: that of https


def responds(url: str, seconds: float) -> bool:
    """Return whether the server of a URL, or the proxy on the way to it, accepts a connection within some seconds.

    The proxy is the one that the environment names, such as HTTPS_PROXY, without the exceptions in NO_PROXY.
    """
    server = urlparse(url)
    proxies = getproxies()
    proxy = proxies.get(server.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(server.hostname or ""):
        server = urlparse(proxy if "://" in proxy else f"http://{proxy}")
    try:
        port = server.port or PORTS.get(server.scheme, 443)
        socket.create_connection((server.hostname or "", port), timeout=seconds).close()
    except (OSError, ValueError):  # ValueError: no port, or no name of a host
        return False
    return True
