"""Cloud TPU: variables, ports, and the metadata server of Compute Engine."""

from __future__ import annotations

import http.server
import threading

import pytest
from recorded_environ import changed, recorded

from launcher.clusters.detect import detect
from launcher.clusters.gce_metadata import fetch_attribute, read_gce_metadata
from trainer.errors import UserError
from trainer.xla_flags import has_tpu


def test_tpu_variables_win_over_the_metadata_and_over_each_other():
    env = recorded("tpu_gce-multislice-slice1-worker0")
    assert detect({**env, "MEGASCALE_SLICE_ID": "0"}).process_id == 0
    assert detect({**env, "MEGASCALE_SLICE_ID": ""}).process_id == 2
    env = changed("tpu_gke-v5e-16-worker2", TPU_PROCESS_ADDRESSES="a:8471,b:8471,c:8471")
    assert (detect(env).host, detect(env).num_processes) == ("a", 3)


def test_the_port_is_not_one_of_libtpu():
    addresses = "localhost:8476,localhost:8477"
    env = changed("tpu_gke-v5e-16-worker2", TPU_PROCESS_ADDRESSES=addresses, TPU_WORKER_ID="1")
    assert detect(env).port == 8478


class Metadata(http.server.BaseHTTPRequestHandler):
    """A metadata server that lacks one attribute, fails once for a second, always for a third."""

    failures = 0

    def do_GET(self):
        key = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
        type(self).failures += key == "flaky"
        if self.headers["Metadata-Flavor"] != "Google":
            self.answer(403, "")
        elif key == "broken" or (key == "flaky" and self.failures == 1):
            self.answer(503, "")
        elif key == "tpu-env":
            self.answer(404, "")
        else:
            self.answer(200, {"agent-worker-number": "1"}.get(key, "t1v-n-0-w-0,t1v-n-0-w-1"))

    def answer(self, status, text):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def metadata_server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):  # a port on which nothing listens
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    Metadata.failures = 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_metadata_server_places_a_tpu_vm(metadata_server):
    found = read_gce_metadata({}, lambda key: fetch_attribute(key, metadata_server), lambda: True)
    assert found == {
        "gce/agent-worker-number": "1",
        "gce/worker-network-endpoints": "t1v-n-0-w-0,t1v-n-0-w-1",
    }
    placement = detect(found)
    assert (placement.cluster, placement.host) == ("tpu_gce", "t1v-n-0-w-0")
    assert (placement.num_processes, placement.process_id) == (2, 1)


def test_a_metadata_server_that_fails_is_asked_again_and_then_reported(metadata_server):
    assert fetch_attribute("flaky", metadata_server, pause=0).startswith("t1v")
    with pytest.raises(UserError, match="does not return broken: status 503"):
        fetch_attribute("broken", metadata_server, pause=0)


def test_a_silent_metadata_server_is_reported_and_a_missing_one_is_not():
    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:  # accepts, never answers
        silent = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(UserError, match="TPU_SKIP_MDS_QUERY=1"):
            fetch_attribute("tpu-env", silent, timeout=0.05, pause=0)
    assert fetch_attribute("tpu-env", silent) is None


def test_no_request_is_made_without_a_tpu_or_where_the_variables_suffice():
    def fetch(key):
        raise AssertionError(key)

    assert read_gce_metadata({}, fetch, lambda: False) == {}
    for name in ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"):
        assert read_gce_metadata({name: "1"}, fetch, lambda: True) == {}
    asked = []
    assert read_gce_metadata({}, asked.append, lambda: True) == {}
    assert asked == ["agent-worker-number"]


def test_a_tpu_is_recognised_by_its_vendor(tmp_path):
    for device, vendor in (("0000:00:04.0", "0x1af4"), ("0000:00:05.0", "0x1ae0")):
        assert not has_tpu(tmp_path)
        (tmp_path / device).mkdir()
        (tmp_path / device / "vendor").write_text(f"{vendor}\n")
    assert has_tpu(tmp_path)
