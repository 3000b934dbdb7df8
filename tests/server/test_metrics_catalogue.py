"""The catalogue, what `/metrics` shows and what the documentation says are the same."""

import re
from pathlib import Path

import httpx
import pytest
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.parser import text_string_to_metric_families

from server.metrics_catalogue import CATALOGUE, Kind, MetricSpec

PAGE = (Path(__file__).parents[2] / "docs" / "observability.md").read_text()
ROW = re.compile(r"^\| `(siluette_\w+)` \| (\w+) \|([^|]*)\|", re.MULTILINE)


async def test_metrics_shows_the_catalogue_and_nothing_else_of_its_own(client: httpx.AsyncClient) -> None:
    request = {"prompt": "Hi", "max_tokens": 2, "activation": {"mode": "relu"}}
    await client.post("/v1/completions", json=request)
    response = await client.get("/metrics")

    assert response.headers["content-type"] == CONTENT_TYPE_LATEST
    shown = {
        family.name: (family.type, family.documentation, {name for s in family.samples for name in s.labels} - {"le"})
        for family in text_string_to_metric_families(response.text)
        if family.name.startswith("siluette_") and not family.name.endswith("_created")
    }
    expected = {spec.family: spec for spec in CATALOGUE.values()}
    # The text format of this version knows no info metrics: they are gauges with the suffix in their name.
    expected["siluette_model_info"] = expected.pop("siluette_model")
    assert set(shown) == set(expected)
    for name, spec in expected.items():
        kind = Kind.GAUGE if spec.kind is Kind.INFO else spec.kind
        assert shown[name] == (kind, spec.documentation, set(spec.labels)), name


@pytest.mark.parametrize("spec", CATALOGUE.values(), ids=lambda spec: spec.name)
def test_names_follow_the_conventions(spec: MetricSpec) -> None:
    assert re.fullmatch(r"siluette_[a-z0-9_]+", spec.name)
    assert spec.name.endswith("_total") == (spec.kind is Kind.COUNTER)
    assert not re.search(r"_(ms|milliseconds|mib|percent)(_|$)", spec.name)  # base units only
    if spec.kind is Kind.HISTOGRAM:
        assert spec.name.endswith(("_seconds", "_tokens"))
    assert spec.documentation


def test_the_page_describes_every_metric_with_its_kind_and_labels() -> None:
    described = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in ROW.findall(PAGE)}

    assert described == {name: (spec.kind, set(spec.labels)) for name, spec in CATALOGUE.items()}
