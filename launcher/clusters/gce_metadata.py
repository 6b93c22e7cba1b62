"""The TPU slice of this machine, from the metadata server of Compute Engine.

https://cloud.google.com/compute/docs/metadata/querying-metadata
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from trainer.errors import UserError
from trainer.xla_flags import has_tpu

_SERVER = "http://metadata.google.internal"
_KEYS = ("agent-worker-number", "worker-network-endpoints", "tpu-env")


def fetch_attribute(
    key: str, server: str = _SERVER, timeout: float = 2.0, tries: int = 3, pause: float = 0.5
) -> str | None:
    """An attribute of this instance.

    Args:
        key: of the attribute.
        server: base address of the metadata server.
        timeout: seconds for one request.
        tries: number of requests to a server that does not answer, or fails.
        pause: seconds between two requests.

    Returns:
        The attribute's text; None if the instance lacks it, or if there is no such server.

    Raises:
        UserError: the server exists but gives no answer. Without one, each host of a slice would
            train a model of its own.
    """
    # The import takes 25 ms; only machines with a TPU need it.
    from urllib.error import HTTPError, URLError
    from urllib.request import ProxyHandler, Request, build_opener

    url = f"{server}/computeMetadata/v1/instance/attributes/{key}"
    request = Request(url, headers={"Metadata-Flavor": "Google"})  # noqa: S310 - http by design
    opener = build_opener(ProxyHandler({}))  # a proxy has no metadata of this machine
    reason = ""
    for i in range(tries):
        if i:
            time.sleep(pause)
        try:
            with opener.open(request, timeout=timeout) as response:
                text: str = response.read().decode()
                return text
        except HTTPError as error:
            error.close()
            if error.code < 500:
                return None
            reason = f"status {error.code}"
        except URLError as error:
            if not isinstance(error.reason, TimeoutError):
                return None  # no such name, or nothing listens: not Compute Engine
            reason = "no answer"
        except OSError as error:
            reason = str(error) or "no answer"
    raise UserError(
        f"the metadata server does not return {key}: {reason}",
        "set TPU_SKIP_MDS_QUERY=1 if this machine is not on Compute Engine",
    )


def read_gce_metadata(
    env: Mapping[str, str],
    fetch: Callable[[str], str | None] = fetch_attribute,
    has_tpu: Callable[[], bool] = has_tpu,
) -> dict[str, str]:
    """Variables for `launcher.clusters.detect` on a TPU VM, in addition to the environment's.

    Args:
        env: environment variables. With TPU_SKIP_MDS_QUERY, TPU_WORKER_HOSTNAMES or
            TPU_PROCESS_ADDRESSES (GKE) there is no request.
        fetch: requests one attribute.
        has_tpu: whether this machine has a TPU; without one there is no request.

    Returns:
        `gce/KEY` to value for the attributes that exist; empty outside TPU VMs.

    Raises:
        UserError: the server exists but gives no answer.
    """
    skip = ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
    if any(env.get(name) for name in skip) or not has_tpu():
        return {}
    found: dict[str, str] = {}
    for key in _KEYS:
        value = fetch(key)
        if value is not None:
            found[f"gce/{key}"] = value
        elif not found:
            break  # not a slice, or no server; the next key would only wait as long
    return found
