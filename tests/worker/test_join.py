"""How a worker reaches its peers."""

from __future__ import annotations

import pytest

from launcher.worker.join import bypass_proxies

OURS = "localhost,127.0.0.1,::1,node1,10.0.0.7"


@pytest.mark.parametrize(
    ("given", "exceptions"),
    [
        ({}, None),
        ({"http_proxy": "", "no_proxy": "a"}, None),
        ({"http_proxy": "p"}, OURS),
        ({"grpc_proxy": "p", "no_proxy": "a, .b"}, f"a,.b,{OURS}"),
        (
            {"https_proxy": "p", "no_grpc_proxy": "c,node1"},
            "c,node1,localhost,127.0.0.1,::1,10.0.0.7",
        ),
        ({"https_proxy": "p", "no_proxy": "a", "no_grpc_proxy": ""}, OURS),
    ],
)
def test_grpc_reaches_the_hosts_of_the_job_without_a_proxy(given, exceptions):
    """And its other exceptions stay: it reads `no_proxy` only without `no_grpc_proxy`."""
    environ = dict(given)
    bypass_proxies(environ, ("node1", "10.0.0.7"))
    assert environ == given | ({} if exceptions is None else {"no_grpc_proxy": exceptions})
