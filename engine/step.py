"""One step of the engine as tensors: what the decoder and its kernels read."""

from dataclasses import dataclass

from torch import Tensor

from engine.activation import ActivationRows


@dataclass(slots=True)
class StepInputs:
    """The token rows of one step, of all its sequences one after another.

    While the same sequences decode, the same object serves step after step, with new contents in the same memory.

    Attributes:
        token_ids: int64 [rows].
        positions: int64 [rows], position of each token in its sequence.
        slots: int64 [rows], block * block_size + offset in the KV cache where the row's key and value go.
        row_sequence: int32 [rows], each row's line in `block_tables`.
        block_tables: int32 [sequences, blocks], cache blocks of each sequence in order, padded with 0.
        activations: Each row's activation.
        skip_zeros: Read the feed-forward's weights for active neurons only; a matter of speed, not of results.
        sample_rows: int64 [sampled], rows after which a token is drawn.
        score_rows: int64 [scored], rows after which the next token is known and its log-probability is wanted.
        score_tokens: int64 [scored], these next tokens.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    row_sequence: Tensor
    block_tables: Tensor
    activations: ActivationRows
    skip_zeros: bool
    sample_rows: Tensor
    score_rows: Tensor
    score_tokens: Tensor
