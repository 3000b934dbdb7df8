"""A real Prometheus scrapes a real server under load of all modes, and every query of dashboard and rules is asked."""

import asyncio
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from scripts.plot_dashboard import legend_of, plot
from tests.debian_programs import find_program
from tests.deploy.test_dashboard import PANELS
from tests.deploy.test_prometheus_rules import PROMETHEUS, RULES
from tests.e2e.conftest import ServerProcess, start_server

pytestmark = pytest.mark.slow

LISTENING = re.compile(r'Listening on"? address=(\S+:\d+)')
QUERIES = {
    f"{panel['title']}: {target['legendFormat']}": (target["legendFormat"], target["expr"])
    for panel in PANELS
    for target in panel["targets"]
}
DEADLINE = 300.0  # seconds, against hanging
MODES = ({"mode": "silu"}, {"mode": "stochastic", "p": 0.6}, {"mode": "relu"})
LOAD_SECONDS = 8.0

# What a server that is well gives no series.
EMPTY = {
    "SiluetteDown",
    "SiluetteEngineDead",
    "SiluetteRestarts",
    "SiluetteServerErrors",
    "SiluetteGenerationErrors",
    "SiluetteKvCacheFull",
    "SiluettePreemptions",
    "SiluetteReluNotSparse",
    "SiluetteDrawsOff",
}
# What has series or not as the machine is slow or fast. All else must have some; SiluetteRefusals has, for the load is
# more than the queue takes.
EITHER = {"SiluetteQueueSlow", "SiluetteFirstTokenSlow"}


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus that runs."""

    url: str

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer of its API."""
        response = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=60)
        body = response.json()
        assert body["status"] == "success", body
        return body["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an expression, now."""
        series: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return series

    def wait_for(self, expression: str) -> None:
        """Until an expression has a series."""
        deadline = time.monotonic() + DEADLINE
        while not self.query(expression):
            assert time.monotonic() < deadline, f"{expression} has no series"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def busy_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    server = start_server(tmp_path_factory.mktemp("busy") / "log.txt", "--max-waiting", "4", "--max-num-seqs", "8")
    yield server
    assert server.stop() == 0, server.log.read_text()


def configuration(server: ServerProcess, folder: Path) -> Path:
    """The project's configuration and rules, for this server, and with shorter intervals."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [server.url.removeprefix("http://")]
    config["rule_files"] = [str(PROMETHEUS / name) for name in config["rule_files"]]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def prometheus(
    busy_server: ServerProcess, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Prometheus]:
    """Prometheus after it has watched a load of all three modes."""
    assert request.config.cache is not None
    program = find_program("prometheus", "prometheus", request.config.cache)
    folder = tmp_path_factory.mktemp("prometheus")
    log = folder / "log.txt"
    command = [
        program,
        f"--config.file={configuration(busy_server, folder)}",
        f"--storage.tsdb.path={folder / 'data'}",
        "--web.listen-address=127.0.0.1:0",
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=folder)
    try:
        deadline = time.monotonic() + DEADLINE
        while (found := LISTENING.search(log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        prometheus = Prometheus(f"http://{found[1]}")
        prometheus.wait_for("siluette_engine_up == 1")
        asyncio.run(load(busy_server.url))
        # The figures of the whole load: everything has been scraped, and rules have seen it.
        prometheus.wait_for("sum(siluette_requests_running) == 0")
        prometheus.wait_for('job_mode:siluette_generation_tokens:rate5m{mode="relu"} > 0')
        yield prometheus
    finally:
        process.terminate()
        process.wait()


async def load(url: str) -> None:
    """Requests of all modes for some seconds, some more than the queue takes, one that the client leaves."""
    deadline = time.monotonic() + LOAD_SECONDS
    async with httpx.AsyncClient(base_url=url, timeout=DEADLINE) as http:

        async def ask(number: int) -> None:
            while time.monotonic() < deadline:
                body = {
                    "prompt": "Once upon a time there was a small house by the sea, and in it lived an old fisherman.",
                    "max_tokens": 24,
                    "n": 2,
                    "activation": MODES[number % 3],
                }
                await http.post("/v1/completions", json=body)
                await asyncio.sleep(0.05)

        async def leave() -> None:
            body = {"prompt": "Once", "max_tokens": 1000, "ignore_eos": True, "stream": True}
            async with http.stream("POST", "/v1/completions", json=body) as response:
                async for _ in response.aiter_lines():
                    break

        await leave()
        await asyncio.gather(*map(ask, range(9)))
        assert (await http.get("/scan")).status_code == 404


@pytest.mark.parametrize(("legend", "expression"), QUERIES.values(), ids=QUERIES)
def test_every_query_of_the_dashboard_has_data(prometheus: Prometheus, legend: str, expression: str) -> None:
    for name, value in {"$__rate_interval": "5m", "$job": "siluette", "$instance": ".*"}.items():
        expression = expression.replace(name, value)

    series = prometheus.query(expression)

    assert series
    values = [float(one["value"][1]) for one in series]
    assert all(value >= 0 for value in values), series  # and not NaN: nothing was divided by 0
    for label in re.findall(r"{{(\w+)}}", legend):
        assert all(label in one["metric"] for one in series)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("record") or rule.get("alert"))
def test_every_rule_has_data_or_is_known_to_have_none(prometheus: Prometheus, rule: dict[str, Any]) -> None:
    series = prometheus.query(rule["expr"])

    if (name := rule.get("alert")) not in EITHER:
        assert (series == []) == (name in EMPTY)


def test_no_rule_failed_and_every_one_was_evaluated(prometheus: Prometheus) -> None:
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]

    assert len(rules) == len(RULES)
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []


def test_prometheus_scrapes_without_complaint(prometheus: Prometheus) -> None:
    (target,) = prometheus.get("targets")["activeTargets"]

    assert target["health"] == "up", target
    assert target["lastError"] == ""


def test_modes_do_what_they_are_for(prometheus: Prometheus) -> None:
    """The default model with its adapter: zeros in RELU mode, some in stochastic mode, none in SILU mode."""
    zeros = {
        one["metric"]["mode"]: float(one["value"][1])
        for one in prometheus.query("job_mode:siluette_ffn_zeros:ratio_rate5m")
    }
    (drawn,), (asked,) = (
        prometheus.query(f"job:siluette_stochastic_p_{name}:ratio_rate5m") for name in ("drawn", "asked")
    )

    assert zeros["silu"] < 0.01 < 0.1 < zeros["stochastic"] < zeros["relu"] < 1
    assert float(asked["value"][1]) == pytest.approx(0.6)
    assert float(drawn["value"][1]) == pytest.approx(0.6, abs=0.005)


def test_promtool_finds_nothing_to_say_about_the_metrics(
    busy_server: ServerProcess, request: pytest.FixtureRequest
) -> None:
    assert request.config.cache is not None
    program = find_program("promtool", "prometheus", request.config.cache)
    text = httpx.get(f"{busy_server.url}/metrics", timeout=60).content

    run = subprocess.run([program, "check", "metrics"], input=text, capture_output=True, check=False)

    assert run.returncode == 0
    assert (run.stdout + run.stderr).decode() == ""


def test_series_are_few(busy_server: ServerProcess, prometheus: Prometheus) -> None:
    """Under load of every kind, what one server costs Prometheus."""
    series = prometheus.query('count({__name__=~"siluette_.*", job="siluette"})')

    assert float(series[0]["value"][1]) < 1000


def test_the_dashboard_can_be_drawn_without_grafana(prometheus: Prometheus, tmp_path: Path) -> None:
    picture = tmp_path / "images" / "dashboard.png"

    plot(prometheus.url, minutes=1, window="5m", path=picture)

    assert picture.read_bytes().startswith(b"\x89PNG")


def test_series_are_named_by_their_labels() -> None:
    assert legend_of("{{mode}} p95", {"mode": "relu", "job": "siluette"}) == "relu p95"
