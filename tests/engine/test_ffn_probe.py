"""Gates and token rows that the feed-forward is measured with."""

import pytest
import torch

from engine.activation import apply_activation
from engine.ffn_probe import make_gate, make_rows, relu_rows
from engine.ffn_router import HIGH_ZEROS, LOW_ZEROS


@pytest.mark.parametrize("zeros", [LOW_ZEROS, HIGH_ZEROS])
def test_made_up_rows_have_the_wanted_share_of_zeros(zeros: float) -> None:
    like, generator = torch.empty(2048, 256), torch.Generator().manual_seed(1)
    gates = make_rows(like, 8, generator) @ make_gate(like, zeros, generator).t()

    activated = apply_activation(gates, relu_rows(8, like.device), layer=0)

    assert (activated == 0).float().mean().item() == pytest.approx(zeros, abs=0.02)
    assert torch.equal(activated == 0, gates <= 0)


def test_they_have_the_type_of_the_weights() -> None:
    like, generator = torch.empty(64, 32, dtype=torch.bfloat16), torch.Generator()

    assert make_gate(like, 0.5, generator).dtype is make_rows(like, 2, generator).dtype is torch.bfloat16
