"""The settings that are compared: what one turns to get other answers from the same model."""

from dataclasses import dataclass, field
from typing import Any

from engine import Activation, ActivationMode, SamplingParams, Scope

TEMPERATURES = (0.3, 0.7, 1.0, 1.5)
PROBABILITIES = (0.9, 0.7, 0.5, 0.3)
WARM = 0.7  # the temperature that stochastic activations are combined with


@dataclass(frozen=True, slots=True)
class Control:
    """One way to get samples: a point in a plot of quality against diversity.

    Attributes:
        label: Its name in tables; unique within an evaluation.
        family: The curve it belongs to.
        value: Where on the curve: the temperature or p, whichever the family varies; None if it stands alone.
        sampling: How tokens are drawn. Number of samples, seed, length and stop string are the evaluation's.
        activation: The activation; its seed is the evaluation's unless it has one.
    """

    label: str
    family: str
    value: float | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    activation: Activation = field(default_factory=Activation)

    @property
    def draws(self) -> bool:
        """Whether samples can differ at all; greedy decoding with a fixed activation has one answer."""
        activation = self.activation
        random_activation = activation.mode is ActivationMode.STOCHASTIC and activation.p not in (0.0, 1.0)
        return self.sampling.temperature > 0 or random_activation

    def to_json(self) -> dict[str, Any]:
        """What was turned, as plain values."""
        return {
            "label": self.label,
            "family": self.family,
            "value": self.value,
            "temperature": self.sampling.temperature,
            "mode": str(self.activation.mode),
            "p": self.activation.p,
            "scope": str(self.activation.scope),
        }


GREEDY_SILU = Control("SILU greedy", "SILU greedy", sampling=SamplingParams(temperature=0.0))


def temperature_control(temperature: float) -> Control:
    """SILU at a temperature: the usual way to diversity."""
    return Control(
        f"SILU, temperature {temperature:g}", "temperature", temperature, SamplingParams(temperature=temperature)
    )


def stochastic_control(p: float, temperature: float = 0.0, scope: Scope = Scope.ALL) -> Control:
    """Stochastic activations with probability `p` of SILU, greedy or at a temperature."""
    decoding = f"temperature {temperature:g}" if temperature else "greedy"
    family = f"p, {decoding}" + (", decode only" if scope is Scope.DECODE else "")
    return Control(
        f"stochastic {p:g}{family[1:]}",
        family,
        p,
        SamplingParams(temperature=temperature),
        Activation(ActivationMode.STOCHASTIC, p=p, scope=scope),
    )


def default_controls() -> tuple[Control, ...]:
    """SILU at four temperatures; stochastic at four p, greedy and warm, in both scopes; RELU greedy."""
    return (
        *(temperature_control(temperature) for temperature in TEMPERATURES),
        *(
            stochastic_control(p, temperature, scope)
            for scope in Scope
            for temperature in (0.0, WARM)
            for p in PROBABILITIES
        ),
        Control("RELU greedy", "RELU", None, SamplingParams(temperature=0.0), Activation(ActivationMode.RELU)),
    )
