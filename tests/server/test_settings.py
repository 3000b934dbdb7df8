"""Settings come from arguments and the environment."""

import pytest
from pydantic import ValidationError

from server.settings import ServerSettings


def test_environment_sets_what_arguments_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SILUETTE_PORT", "9000")
    monkeypatch.setenv("SILUETTE_LOG_LEVEL", "debug")
    settings = ServerSettings(log_level="error")

    assert (settings.port, settings.log_level) == (9000, "error")


@pytest.mark.parametrize(
    "bad",
    [
        {"port": 70000},
        {"shutdown_timeout": -1},
        {"drain_delay": -1},
        {"shutdown_timeout": float("inf")},
        {"log_level": "loud"},
    ],
)
def test_values_out_of_range(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        ServerSettings(**bad)  # type: ignore[arg-type]
