"""The Grafana dashboard: its committed JSON is what the code makes, and it knows the server's metrics."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.grafana.dashboard import JSON_PATH, build
from server.metrics_catalogue import CATALOGUE, Kind

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD: dict[str, Any] = json.loads(JSON_PATH.read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TOPICS = (
    "Time to first token",
    "Zeros by mode",
    "by layers",
    "Generated tokens",
    "KV cache",
    "Queue",
    "Errors",
    "p of",
)


def exposed_names() -> set[str]:
    """Every name that a query may use."""
    names = set(CATALOGUE)
    for spec in CATALOGUE.values():
        if spec.kind is Kind.HISTOGRAM:
            names |= {f"{spec.name}_{part}" for part in ("bucket", "sum", "count")}
    return names


def test_the_committed_file_is_what_the_code_makes() -> None:
    assert JSON_PATH.read_text() == build(), "run python -m deploy.grafana.dashboard"


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_asks_for_metrics_that_exist(panel: dict[str, Any]) -> None:
    assert panel["description"]
    assert panel["datasource"]["uid"] == "${datasource}"
    for target in panel["targets"]:
        used = re.findall(r"\bsiluette_\w+", target["expr"])
        assert used
        assert set(used) <= exposed_names()
        assert target["expr"].count('job="$job", instance=~"$instance"') == len(used)


@pytest.mark.parametrize("topic", TOPICS)
def test_there_is_a_panel_for_each_topic(topic: str) -> None:
    assert any(topic in panel["title"] for panel in PANELS)


def test_panels_do_not_overlap() -> None:
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert all(x < 24 for x, _ in cells)


def test_grafana_is_provisioned_with_the_source_and_the_folder_of_the_dashboard() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "siluette.yml").read_text())["providers"]
    prometheus = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())

    assert source["type"] == "prometheus"
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    assert provider["type"] == "file"
    assert provider["options"]["path"]
