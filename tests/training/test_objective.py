"""The loss against PyTorch's own functions, in float32 and through autograd."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from training.objective import CHUNK, losses

BATCH, TOKENS, VOCAB = 3, 50, 37
WEIGHTS = [0.0, 0.3, 1.0]


def draw(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, token ids, the teacher's logits."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(BATCH, TOKENS, VOCAB, generator=generator)
    teacher = logits + torch.randn(BATCH, TOKENS, VOCAB, generator=generator)
    return logits, torch.randint(VOCAB, (BATCH, TOKENS), generator=generator), teacher


def expected(logits: Tensor, token_ids: Tensor, teacher: Tensor | None, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Total, next token and divergence as they are written in a textbook."""
    predicting, targets = logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten()
    next_token = functional.cross_entropy(predicting, targets)
    divergence = torch.zeros(())
    if teacher is not None:
        divergence = functional.kl_div(
            predicting.log_softmax(-1),
            teacher[:, :-1].flatten(0, 1).log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
    return (1 - weight) * next_token + weight * divergence, next_token, divergence


def test_the_batch_is_longer_than_a_chunk() -> None:
    assert BATCH * TOKENS > 2 * CHUNK
    assert BATCH * TOKENS % CHUNK


@pytest.mark.parametrize("weight", WEIGHTS)
def test_values_and_gradients_are_those_of_pytorch(weight: float) -> None:
    logits, token_ids, teacher = draw()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()

    result = losses(ours, token_ids, teacher, weight)
    total, next_token, divergence = expected(theirs, token_ids, teacher, weight)
    (0.25 * result.total).backward()  # a share of a batch, as in training
    (0.25 * total).backward()

    assert result.distillation is not None
    torch.testing.assert_close(result.total.detach(), total.detach())
    torch.testing.assert_close(result.next_token, next_token.detach())
    torch.testing.assert_close(result.distillation, divergence.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)


def test_without_a_teacher_it_is_the_cross_entropy() -> None:
    logits, token_ids, _ = draw()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()

    result = losses(ours, token_ids, None, 0.0)
    total, next_token, _ = expected(theirs, token_ids, None, 0.0)
    result.total.backward()
    total.backward()

    assert result.distillation is None
    torch.testing.assert_close(result.next_token, next_token.detach())
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)


def test_the_last_position_predicts_nothing() -> None:
    logits, token_ids, teacher = draw()
    logits.requires_grad_()
    before = losses(logits, token_ids, teacher, 0.5)
    before.total.backward()
    changed = torch.cat([logits.detach()[:, :-1], torch.zeros(BATCH, 1, VOCAB)], 1)

    assert logits.grad is not None
    assert not logits.grad[:, -1].any()
    torch.testing.assert_close(losses(changed, token_ids, teacher, 0.5).total, before.total.detach())


def test_a_model_does_not_diverge_from_itself() -> None:
    logits, token_ids, _ = draw()
    logits.requires_grad_()
    result = losses(logits, token_ids, logits.detach(), 1.0)
    result.total.backward()

    assert result.distillation is not None
    assert result.distillation.item() == pytest.approx(0.0, abs=1e-6)
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-8


@pytest.mark.parametrize("weight", WEIGHTS)
def test_bfloat16_logits_lose_nothing_but_their_gradients_last_bits(weight: float) -> None:
    logits, token_ids, teacher = (tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in draw())
    ours, theirs = logits.clone().requires_grad_(), logits.float().requires_grad_()

    result = losses(ours, token_ids, teacher, weight)
    total, _, _ = expected(theirs, token_ids, teacher.float(), weight)
    result.total.backward()
    total.backward()

    assert result.total.dtype == torch.float32
    torch.testing.assert_close(result.total.detach(), total.detach(), rtol=1e-5, atol=1e-5)
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad.float(), theirs.grad, rtol=2**-8, atol=1e-8)
