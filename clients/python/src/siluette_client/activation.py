"""How a request's feed-forward layers are activated."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Mode = Literal["silu", "stochastic", "relu"]
Scope = Literal["all", "decode"]


class Activation(BaseModel):
    """The activation of a request, and in an answer the one that was used: send it back to get the same text again.

    Which values are allowed is the server's to say, because it depends on the checkpoint; it refuses the others with
    an error whose `param` names the field. `mode` and `scope` are open so that a newer server's can be read.
    """

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    mode: str = "silu"
    """`silu` is deterministic, `stochastic` draws for each negative gate value, `relu` is sparse."""
    p: float | None = None
    """Probability of SILU for a negative gate value, in [0, 1]; stochastic mode only. None: the server's default."""
    seed: int | None = None
    """64-bit seed of the draws; stochastic mode only. None: the request's `seed`, else the server draws one."""
    scope: str | None = None
    """`all` tokens, or `decode`: generated tokens only, so that samples share one prefill. None: `all`."""

    @classmethod
    def silu(cls) -> "Activation":
        """Deterministic, as the model was trained."""
        return cls(mode="silu")

    @classmethod
    def stochastic(cls, p: float | None = None, seed: int | None = None, scope: Scope | None = None) -> "Activation":
        """Each negative gate value goes through SILU with probability `p`, else becomes 0."""
        return cls(mode="stochastic", p=p, seed=seed, scope=scope)

    @classmethod
    def relu(cls, scope: Scope | None = None) -> "Activation":
        """Negative gate values become 0, which sparse kernels skip."""
        return cls(mode="relu", scope=scope)

    def to_wire(self) -> dict[str, object]:
        """The form of a request's body."""
        return self.model_dump(mode="json", exclude_none=True)


ActivationLike = Activation | Mode
"""An activation, or the name of a mode with its default values."""


def as_activation(value: ActivationLike) -> Activation:
    """The activation that is meant."""
    return value if isinstance(value, Activation) else Activation(mode=value)
