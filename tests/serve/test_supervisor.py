"""Real processes: killed, stopped, drained, and asked by probes meanwhile."""

from __future__ import annotations

import signal
import socket
import ssl
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from nanoworks.checkpoint import save_checkpoint
from nanoworks.engine import Engine
from tests.serve.served import Served, serving, until

BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0}
ENDLESS = {**BODY, "max_tokens": 100_000, "stream": True}


@pytest.fixture(scope="module")
def checkpoint(endless_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model that answers `ababab...` for minutes."""
    path = tmp_path_factory.mktemp("served") / "tiny"
    with save_checkpoint(path, endless_engine.model, endless_engine.tokenizer, metadata={"run_id": "r1"}):
        pass
    return path


def test_an_engine_that_dies_is_replaced_and_nobody_is_left_waiting(checkpoint: Path) -> None:
    with serving(checkpoint) as served, ThreadPoolExecutor() as pool:
        assert [served.get(f"/{probe}").status_code for probe in ("live", "health", "ready")] == [200] * 3
        expected = served.ask().json()["choices"]
        asked = [pool.submit(served.ask, {**ENDLESS, "stream": stream}) for stream in (True, False)]
        until(lambda: served.metric("num_requests_running") == 2)

        served.engine.kill()
        assert until(lambda: served.get("/ready").status_code == 503) < 5
        assert served.get("/live").status_code == 200
        error = served.get("/health").json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "no_engine")
        stream, whole = (answer.result() for answer in asked)
        assert '"type":"server_error"' in stream.text.replace('": "', '":"').split("data: ")[-2]
        assert (whole.status_code, whole.json()["error"]["type"]) == (503, "server_error")
        assert served.ask().status_code in (200, 503)  # at once: it does not wait for the new engine
        assert served.metric("engine_up") == 0 or served.get("/ready").status_code == 200

        until(lambda: served.get("/ready").status_code == 200)
        assert served.ask().json()["choices"] == expected
        assert served.metric("engine_up") == 1


def test_an_engine_that_hangs_is_replaced(checkpoint: Path) -> None:
    options = ("--hang-seconds", "2", "--canary-seconds", "1", "--drain-seconds", "1")
    with ThreadPoolExecutor() as pool, serving(checkpoint, *options) as served:
        first = served.engine
        first.send_signal(signal.SIGSTOP)
        until(lambda: served.get("/ready").status_code == 503)  # once the last good sign is old
        assert "computed nothing for 1 s" in served.get("/ready").text
        assert served.get("/health").status_code == 200  # it is there, and does nothing
        assert served.ask().status_code == 503  # waits until the engine is found to hang
        until(lambda: served.get("/ready").status_code == 200)
        assert served.engine.pid != first.pid
        assert served.ask().status_code == 200
        endless = pool.submit(served.ask, ENDLESS)
        until(lambda: served.metric("num_requests_running") == 1)
    text = endless.result().text  # it would have taken longer than a server that was told to stop may
    assert "the server is stopping" in text
    assert text.endswith("data: [DONE]\n\n")


def test_a_signal_under_load_lets_answers_end(checkpoint: Path) -> None:
    served = Served(checkpoint)
    with ThreadPoolExecutor(15) as pool:
        try:
            asked = [pool.submit(served.ask, {**BODY, "max_tokens": 1000, "n": 1 + i % 2}) for i in range(10)]
            until(lambda: served.metric("num_requests_running") == 15)
            served.process.terminate()
            until(lambda: not accepts(served.url))
            for answer in asked:
                choices = answer.result().json()["choices"]
                assert [(c["finish_reason"], len(c["message"]["content"])) for c in choices] in (
                    [("length", 1000)],
                    [("length", 1000)] * 2,
                )
            assert served.process.wait(30) == 0
        finally:
            served.process.kill()
            _, err = served.process.communicate()
    assert "Traceback" not in err, err
    assert "Finishing 10 answers" in err


def accepts(url: str) -> bool:
    try:
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def test_over_tls_and_killed(checkpoint: Path, tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    make += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    subprocess.run([*make, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    served = Served(checkpoint, "--tls-cert", str(cert), "--tls-key", str(key))
    engine = served.engine
    try:
        assert served.url.startswith("https://")
        with httpx.Client(verify=ssl.create_default_context(cafile=str(cert))) as client:
            assert client.post(f"{served.url}/v1/chat/completions", json=BODY).status_code == 200
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            httpx.get(served.url)
    finally:
        served.process.kill()
        served.process.communicate()
    engine.wait(30)  # it does not outlive a server that could not say goodbye
    assert not engine.is_running()
