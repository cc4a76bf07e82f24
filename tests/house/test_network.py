# SPDX-License-Identifier: Apache-2.0
"""tests/conftest.py keeps every test off the network, and leaves this machine's own sockets alone."""

from __future__ import annotations

import socket

import pytest


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1"])  # addresses reserved for documentation
def test_a_connection_elsewhere_fails(host: str) -> None:
    with pytest.raises(RuntimeError, match="tests use no network"):
        socket.create_connection((host, 80), timeout=1)


def test_a_connection_to_this_machine_works() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname(), timeout=5)
        peer, _ = server.accept()
        client.sendall(b"hello")
        assert peer.recv(5) == b"hello"
        client.close()
        peer.close()
