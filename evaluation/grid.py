"""The activations that are compared, and how they are spelled on a command line."""

from collections.abc import Sequence

from engine import Activation, ActivationMode, ActivationSupport, EngineError, UntunedActivation
from evaluation.errors import GridError

DEFAULT_GRID = (
    Activation(),
    *(Activation(ActivationMode.STOCHASTIC, p=p) for p in (0.9, 0.7, 0.5, 0.3)),
    Activation(ActivationMode.RELU),
)
MODES_GRID = (Activation(), Activation(ActivationMode.STOCHASTIC, p=0.5), Activation(ActivationMode.RELU))  # in short


def parse_activation(spec: str) -> Activation:
    """Read `silu`, `relu`, `stochastic` or `stochastic:0.7`, the number being p.

    Raises:
        GridError: The mode or p is none; the message says what would do.
    """
    mode, colon, number = spec.partition(":")
    try:
        return Activation(ActivationMode(mode), p=float(number) if colon else None)
    except (ValueError, EngineError) as error:
        raise GridError(
            f"an activation must be 'silu', 'relu' or 'stochastic:P' with P in [0, 1], got {spec!r}"
        ) from error


def describe(activation: Activation) -> str:
    """The activation as `parse_activation` reads it."""
    return f"{activation.mode}:{activation.p:g}" if activation.p is not None else str(activation.mode)


def supported(grid: Sequence[Activation], support: ActivationSupport) -> list[Activation]:
    """The activations of a grid that a checkpoint was tuned for, in order."""
    kept = []
    for activation in grid:
        try:
            support.check(activation)
        except UntunedActivation:
            continue
        kept.append(activation)
    return kept


def silu_share(activation: Activation) -> float:
    """Share of the negative gate values that go through SILU: p, 1 in SILU mode, 0 in RELU mode."""
    if activation.mode is ActivationMode.STOCHASTIC:
        assert activation.p is not None
        return activation.p
    return 1.0 if activation.mode is ActivationMode.SILU else 0.0
