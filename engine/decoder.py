"""The Llama-family decoder: a stack of pre-norm attention and gated feed-forward layers."""

from torch import Tensor

from engine.kernels.backend import Backend
from engine.step import StepInputs


class Decoder:
    """Runs steps over a backend's kernels. Its only state is the backend's KV cache."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.config = backend.config
        self.weights = backend.weights

    def forward(self, step: StepInputs) -> Tensor:
        """Run the step's token rows through all layers.

        Returns:
            Hidden states float32 [rows, hidden], for `logits` of those rows that need them.
        """
        backend, weights = self.backend, self.weights
        backend.begin(step)
        # The residual stream stays in float32: small contributions of late layers would drown in bfloat16.
        x = weights.embedding[step.token_ids].float()
        for index, layer in enumerate(weights.layers):
            x = x + backend.attention(index, backend.norm(x, layer.input_norm), step)
            x = x + backend.feed_forward(index, backend.norm(x, layer.post_norm), step)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [rows, hidden] of `forward` to logits [rows, vocab] in the model's dtype."""
        return self.backend.logits(self.backend.norm(hidden, self.weights.final_norm))
