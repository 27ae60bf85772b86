"""A real Prometheus scrapes a real server: rules evaluate, one fires, every query of the dashboard has an answer."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from nanoworks.cli.main import app
from nanoworks.serve.settings import ServerSettings

MONITORING = Path(__file__).parents[2] / "deploy" / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana-dashboard.json").read_text())
ALERTS = yaml.safe_load((MONITORING / "alerts.yml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
NAME = re.compile(r"\b(?:nanoworks:|process_)\w+")


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed; see scripts/system_packages.sh")
    return found


def queries() -> list[tuple[str, str]]:
    """The dashboard's (panel, query), its variables filled in as Grafana does for `All`."""
    found = []
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            query = target["expr"].replace("$__rate_interval", "1m")
            query = query.replace("$instance", ".*").replace("$model_name", ".*")
            assert "$" not in query, f"a variable that this test does not know: {query}"
            found.append((panel["title"], query))
    return found


# ---------------------------------------------------------------------------------------------- without a server


def test_promtool_accepts_the_rules_and_the_configuration(tmp_path):
    promtool = program("promtool")
    shutil.copytree(MONITORING, tmp_path, dirs_exist_ok=True)
    (tmp_path / "nanoworks.key").write_text("secret")
    for what, file in (("rules", "alerts.yml"), ("config", "prometheus.yml")):
        command = [promtool, "check", what, str(tmp_path / file)]
        checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert checked.returncode == 0, checked.stdout + checked.stderr


def test_alerts_fire_when_they_should_and_only_then():
    command = [program("promtool"), "test", "rules", str(Path(__file__).parent / "monitoring" / "alerts_test.yml")]
    tested = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_every_alert_has_a_case_where_it_fires_and_one_where_it_does_not():
    tests = yaml.safe_load((Path(__file__).parent / "monitoring" / "alerts_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    names = {rule["alert"] for rule in RULES}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == names


def test_the_documentation_lists_every_alert():
    page = (MONITORING.parents[1] / "docs" / "monitoring.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \| (\w+) \| (\w+) \|", page, flags=re.MULTILINE)
    alerts = [(rule["alert"], rule["labels"]["severity"], rule["for"]) for rule in RULES]
    assert [row for row in listed if row[0].startswith("Nanoworks")] == alerts


def test_the_dashboard_is_sound():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "model_name", "instance"}
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"], "panels overlap"


# ------------------------------------------------------------------------------------- a Prometheus and a server


class Prometheus:
    """A real one, its rules those of alerts.yml that wait for nothing, scraping `target` five times a second."""

    def __init__(self, folder: Path, target: str, key: str) -> None:
        self._folder = folder
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "200ms"}
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [target.removeprefix("http://")]
        (folder / config["scrape_configs"][0]["authorization"]["credentials_file"]).write_text(key)
        alerts = json.loads(json.dumps(ALERTS))
        for group in alerts["groups"]:
            for rule in group["rules"]:
                rule["for"] = "0s"
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        (folder / "alerts.yml").write_text(yaml.safe_dump(alerts))
        with (folder / "log").open("w") as log:
            self._process = subprocess.Popen(
                [
                    program("prometheus"),
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.until(lambda: self._ready(), "Prometheus is up")

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self._url}/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def get(self, path: str, **params: str) -> Any:
        answer = httpx.get(f"{self._url}/api/v1/{path}", params=params, timeout=30).json()
        assert answer["status"] == "success", f"{path} {params}: {answer}"
        return answer["data"]

    def query(self, expression: str) -> list[Any]:
        return self.get("query", query=expression)["result"]

    def firing(self) -> set[str]:
        return {a["labels"]["alertname"] for a in self.get("alerts")["alerts"] if a["state"] == "firing"}

    def until(self, holds: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + 90
        while not holds():
            assert self._process.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < deadline, f"never: {what}"
            time.sleep(0.1)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=60)


@pytest.fixture(scope="module")
def scraped(serve, make_engine, tmp_path_factory) -> Iterator[tuple[Prometheus, Callable[[], None]]]:
    """Prometheus with a keyed server that has answered some requests, and a function that stops that server."""
    program("prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    keys = ["--keys-db", str(folder / "keys.db")]
    made = CliRunner().invoke(app, ["keys", "create", "prometheus", "--role", "admin", *keys])
    assert made.exit_code == 0, made.output
    key = made.stdout
    serving = serve(make_engine(context=256), ServerSettings(auth=True, keys_db=keys[1]))
    url = serving.__enter__()
    running = True

    def stop() -> None:
        nonlocal running
        if running:
            running = False
            serving.__exit__(None, None, None)

    prometheus = None
    try:
        prometheus = Prometheus(folder, url, key)
        prometheus.until(lambda: prometheus.query("nanoworks:engine_up == 1"), "the first scrape")
        body = {"messages": [{"role": "user", "content": "hello " * 10}], "max_tokens": 16, "min_tokens": 16}
        headers = {"Authorization": f"Bearer {key.strip()}"}
        for _ in range(3):
            httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60).raise_for_status()
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 401
        generated = 'increase(nanoworks:generation_tokens_total{model_name="tiny"}[1m]) > 0'
        prometheus.until(lambda: prometheus.query(generated), "the answers are counted")
        yield prometheus, stop
    finally:
        if prometheus is not None:
            prometheus.close()
        stop()


def test_the_target_is_scraped_without_errors(scraped):
    prometheus, _ = scraped
    (target,) = prometheus.get("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")


def test_the_alias_is_scraped_too(scraped):
    prometheus, _ = scraped
    prometheus.until(lambda: prometheus.query("vllm:generation_tokens_total == 48"), "vllm:generation_tokens_total")


@pytest.mark.parametrize(("panel", "query"), queries(), ids=lambda text: text[:30])
def test_every_query_of_the_dashboard_has_an_answer(scraped, panel, query):
    prometheus, _ = scraped
    known = set(prometheus.get("label/__name__/values"))
    names = set(NAME.findall(query))
    assert names, "a query without a metric of ours"
    assert names <= known
    result = prometheus.query(query)
    assert result, f"{panel}: no answer to {query}"


def test_every_variable_of_the_dashboard_has_values(scraped):
    prometheus, _ = scraped
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert asked is not None
            assert prometheus.get(f"label/{asked[2]}/values", **{"match[]": asked[1]})


def test_every_rule_evaluates_and_names_metrics_that_exist(scraped):
    prometheus, _ = scraped
    known = set(prometheus.get("label/__name__/values"))
    for rule in RULES:
        assert set(NAME.findall(rule["expr"])) <= known, rule["alert"]

    def evaluated() -> list[Any]:
        rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
        return rules if all(rule["health"] != "unknown" for rule in rules) else []

    prometheus.until(evaluated, "the rules are evaluated")
    rules = evaluated()
    assert {rule["name"] for rule in rules} == {rule["alert"] for rule in RULES}
    assert [rule for rule in rules if rule["health"] != "ok" or rule.get("lastError")] == []
    assert "NanoworksDown" not in prometheus.firing()


def test_an_alert_fires_when_the_server_is_gone(scraped):
    prometheus, stop = scraped
    stop()
    prometheus.until(lambda: "NanoworksDown" in prometheus.firing(), "NanoworksDown fires")
