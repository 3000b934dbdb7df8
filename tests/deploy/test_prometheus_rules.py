"""Prometheus' own checks of its configuration and rules, and what only we can know about them."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.debian_programs import find_program
from tests.deploy.test_dashboard import exposed_names

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULE_FILES = sorted((PROMETHEUS / "rules").glob("*.yml"))
RULES: list[dict[str, Any]] = [
    rule for path in RULE_FILES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
PAGE = (ROOT / "docs" / "observability.md").read_text()


def promtool(request: pytest.FixtureRequest, *arguments: str | Path) -> str:
    """What promtool says; it must find nothing wrong."""
    assert request.config.cache is not None
    program = find_program("promtool", "prometheus", request.config.cache)
    run = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_the_configuration_and_its_rules_are_valid(request: pytest.FixtureRequest) -> None:
    said = promtool(request, "check", "config", PROMETHEUS / "prometheus.yml")

    assert f"{len(RULE_FILES)} rule files found" in said


def test_rules_do_what_their_tests_say(request: pytest.FixtureRequest) -> None:
    promtool(request, "test", "rules", PROMETHEUS / "tests" / "rules_test.yml")


def test_every_alert_fires_in_a_test() -> None:
    tests = yaml.safe_load((PROMETHEUS / "tests" / "rules_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test.get("alert_rule_test", []) if case["exp_alerts"]}

    assert fired == {rule["alert"] for rule in ALERTS}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("record") or rule.get("alert"))
def test_a_rule_uses_names_that_exist(rule: dict[str, Any]) -> None:
    expression = re.sub(r'"[^"]*"', "", rule["expr"])
    used = set(re.findall(r"(?<![:\w])siluette_\w+", expression))
    recorded = set(re.findall(r"\w+:siluette_\w+:\w+", expression))

    assert used <= exposed_names()
    assert recorded <= RECORDED
    assert used or recorded or "up{" in expression or "process_start_time_seconds{" in expression


def test_the_page_explains_every_alert_with_its_severity() -> None:
    explained = dict(re.findall(r"^\| `(Siluette\w+)` \| (\w+) \|", PAGE, re.MULTILINE))

    assert explained == {rule["alert"]: rule["labels"]["severity"] for rule in ALERTS}
    assert all(rule["annotations"].keys() == {"summary", "description"} for rule in ALERTS)


def test_the_scraped_job_is_the_one_that_rules_select() -> None:
    (job,) = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    selected = {name for rule in RULES for name in re.findall(r'job="(\w+)"', rule["expr"])}

    assert selected == {job["job_name"]}
