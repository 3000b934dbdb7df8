"""The grid of controls."""

import pytest

from engine import Activation, ActivationMode, SamplingParams, Scope
from evaluation.controls import GREEDY_SILU, Control, default_controls, stochastic_control, temperature_control


def test_default_grid_compares_temperature_with_p_in_both_scopes() -> None:
    controls = default_controls()
    by_mode = {mode: [item for item in controls if item.activation.mode is mode] for mode in ActivationMode}
    assert [item.sampling.temperature for item in by_mode[ActivationMode.SILU]] == [0.3, 0.7, 1.0, 1.5]
    stochastic = {
        (item.activation.p, item.sampling.temperature, item.activation.scope)
        for item in by_mode[ActivationMode.STOCHASTIC]
    }
    assert stochastic == {(p, t, scope) for p in (0.9, 0.7, 0.5, 0.3) for t in (0.0, 0.7) for scope in Scope}
    assert [item.sampling.temperature for item in by_mode[ActivationMode.RELU]] == [0.0]
    assert len(controls) == 4 + 16 + 1


def test_labels_tell_controls_apart_and_families_vary_one_value() -> None:
    controls = default_controls()
    assert len({control.label for control in controls}) == len(controls)
    places = [(control.family, control.value) for control in controls]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize(
    ("control", "draws"),
    [
        (GREEDY_SILU, False),
        (temperature_control(0.3), True),
        (stochastic_control(0.9), True),
        (stochastic_control(0.9, scope=Scope.DECODE), True),
        (stochastic_control(1.0), False),
        (stochastic_control(0.0), False),
        (stochastic_control(0.0, temperature=0.7), True),
        (Control("relu", "relu", None, SamplingParams(temperature=0.0), Activation(ActivationMode.RELU)), False),
    ],
    ids=lambda value: value.label if isinstance(value, Control) else None,
)
def test_knows_whether_it_draws(control: Control, draws: bool) -> None:
    assert control.draws is draws


def test_json_says_what_was_turned() -> None:
    assert stochastic_control(0.5, 0.7, Scope.DECODE).to_json() == {
        "label": "stochastic 0.5, temperature 0.7, decode only",
        "family": "p, temperature 0.7, decode only",
        "value": 0.5,
        "temperature": 0.7,
        "mode": "stochastic",
        "p": 0.5,
        "scope": "decode",
    }
