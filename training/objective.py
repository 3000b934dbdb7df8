"""The loss: the next token, the untouched model's distribution, or a mixture of both."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100  # target of a position that predicts nothing
# Rows of logits that are in float32 at a time: small enough for a processor's cache; enough to keep a GPU busy.
CHUNK, CUDA_CHUNK = 64, 4096


@dataclass(frozen=True, slots=True)
class Losses:
    """Means over the predicted tokens, in nats.

    Attributes:
        total: What is minimised; has a gradient.
        next_token: Cross-entropy of the text's next token.
        distillation: Kullback-Leibler divergence of the model from its teacher; None without a teacher.
    """

    total: Tensor
    next_token: Tensor
    distillation: Tensor | None


class _HeadLoss(torch.autograd.Function):
    """(1 - w) * cross-entropy + w * KL(teacher || model), in chunks, with its gradient computed on the way forward.

    The gradient with respect to the logits is `(1 - w) * (softmax - onehot) + w * (softmax - teacher's softmax)`, so
    that neither float32 logits nor probabilities of all tokens need to be kept.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, teacher: Tensor | None, weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        predicted = targets != IGNORED
        tokens = int(predicted.sum())
        gradient = torch.empty_like(logits)
        next_token = logits.new_zeros((), dtype=torch.float32)
        divergence = logits.new_zeros((), dtype=torch.float32)
        chunk = CUDA_CHUNK if logits.is_cuda else CHUNK
        for start in range(0, len(logits), chunk):
            rows = slice(start, start + chunk)
            log_probs = functional.log_softmax(logits[rows], -1, dtype=torch.float32)
            next_token += functional.nll_loss(log_probs, targets[rows], reduction="sum", ignore_index=IGNORED)
            chunk_gradient = log_probs.exp()
            if teacher is not None:
                expected = functional.log_softmax(teacher[rows], -1, dtype=torch.float32)
                difference = log_probs.neg_().add_(expected)
                expected.exp_().mul_(predicted[rows, None])
                divergence += torch.dot(expected.flatten(), difference.flatten())
                chunk_gradient -= expected.mul_(weight)
            index = predicted[rows].nonzero().flatten()
            chunk_gradient[index, targets[rows][index]] -= 1 - weight
            gradient[rows] = chunk_gradient.mul_(predicted[rows, None] / tokens)
        ctx.save_for_backward(gradient)
        next_token, divergence = next_token / tokens, divergence / tokens
        total = (1 - weight) * next_token + weight * divergence
        ctx.mark_non_differentiable(next_token, divergence)
        return total, next_token, divergence

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None


def losses(logits: Tensor, token_ids: Tensor, teacher_logits: Tensor | None, distillation: float) -> Losses:
    """Loss of a batch.

    Args:
        logits: [batch, tokens, vocab] of the model.
        token_ids: [batch, tokens]; position t predicts token t + 1, the last one nothing.
        teacher_logits: Like `logits`; None if `distillation` is 0.
        distillation: Weight of the divergence from the teacher (Hinton et al., arXiv 1503.02531), in [0, 1].
    """
    targets = functional.pad(token_ids[:, 1:], (0, 1), value=IGNORED)
    teacher = None if teacher_logits is None else teacher_logits.flatten(0, 1)
    total, next_token, divergence = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        logits.flatten(0, 1), targets.flatten(), teacher, distillation
    )
    return Losses(total, next_token, None if teacher is None else divergence)
