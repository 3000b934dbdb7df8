"""What a request does to its logits before temperature: `logit_bias`, penalties, and end tokens that come too early."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidRequest
from engine.sampling_params import SamplingParams

_MIN_REPETITION_PENALTY = 1e-30  # float32 would round less to 0
_LARGEST = np.finfo(np.float32).max


def check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """Refuse token ids that the model does not have; for the admission of a request.

    Raises:
        InvalidRequest: An id in `logit_bias` or `stop_token_ids` is outside [0, vocab_size).
    """
    for name, token_ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequest(f"{name} has the token id {token_id}; ids must be in [0, {vocab_size - 1}]", name)


def edits_logits(params: SamplingParams, num_output_tokens: int) -> bool:
    """Whether the next token's logits differ from the model's for a sequence with this many output tokens."""
    return bool(params.logit_bias) or _has_penalties(params) or num_output_tokens < params.min_tokens


def _has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or _has_output_penalties(params)


def _has_output_penalties(params: SamplingParams) -> bool:
    return params.presence_penalty != 0 or params.frequency_penalty != 0


class TokenCounts:
    """The distinct tokens of a growing sequence, and how often each was generated.

    Counting is incremental: a step costs its new tokens, not the whole sequence.
    """

    def __init__(self, prompt_token_ids: Iterable[int] = ()) -> None:
        self._ids = np.fromiter(dict.fromkeys(prompt_token_ids), np.int64)
        self._counts = np.zeros(len(self._ids), np.float32)
        self._slots = {int(token_id): slot for slot, token_id in enumerate(self._ids)}
        self._num_counted = 0

    def update(self, output_token_ids: Sequence[int]) -> None:
        """Count the output tokens that are new since the last call.

        Raises:
            ValueError: The output is shorter than it was.
        """
        if len(output_token_ids) < self._num_counted:
            raise ValueError(f"{self._num_counted} output tokens were counted, now there are {len(output_token_ids)}")
        for token_id in output_token_ids[self._num_counted :]:
            slot = self._slots.setdefault(token_id, len(self._slots))
            if slot == len(self._ids):
                room = max(64, slot)
                self._ids = np.concatenate((self._ids, np.zeros(room, np.int64)))
                self._counts = np.concatenate((self._counts, np.zeros(room, np.float32)))
            self._ids[slot] = token_id
            self._counts[slot] += 1
        self._num_counted = len(output_token_ids)

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """int64 [distinct], tokens of prompt and output by first appearance."""
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """float32 [distinct], occurrences in the output."""
        return self._counts[: len(self._slots)]


class LogitEdits:
    """The edits of one sequence, prepared once and applied at each of its steps.

    Args:
        params: The request's parameters; its token ids are in the vocabulary (`check_token_ids`).
        prompt_token_ids: The prompt, for `repetition_penalty`.
        end_token_ids: End-of-sequence and stop tokens, impossible before `min_tokens`.
    """

    def __init__(self, params: SamplingParams, prompt_token_ids: Sequence[int], end_token_ids: Sequence[int]) -> None:
        self._params = params
        self._bias_ids = np.fromiter(params.logit_bias.keys(), np.int64)
        self._biases = np.fromiter(params.logit_bias.values(), np.float32)
        self._end_ids = np.array(end_token_ids, np.int64)
        self._repetition = np.float32(max(params.repetition_penalty, _MIN_REPETITION_PENALTY))
        self._counts = TokenCounts(prompt_token_ids if params.repetition_penalty != 1 else ())

    def apply(self, row: NDArray[np.float32], output_token_ids: Sequence[int]) -> None:
        """Edit the logits of the next token in place.

        Args:
            row: float32 [vocabulary].
            output_token_ids: The tokens generated so far; those of the last call and perhaps more.
        """
        if self._bias_ids.size:
            row[self._bias_ids] += self._biases
        if _has_penalties(self._params):
            self._counts.update(output_token_ids)
            self._penalise(row)
        if len(output_token_ids) < self._params.min_tokens:
            # A configured end token may lie beyond the vocabulary; it is impossible as it is.
            row[self._end_ids[self._end_ids < row.size]] = -np.inf

    def touched(self, output_token_ids: Sequence[int], vocab_size: int) -> NDArray[np.int64]:
        """int64 [distinct], the tokens whose logits `apply` reads or writes, for callers that hold no whole row."""
        parts = [self._bias_ids]
        if _has_penalties(self._params):
            self._counts.update(output_token_ids)
            parts.append(self._counts.token_ids)
        if len(output_token_ids) < self._params.min_tokens:
            parts.append(self._end_ids[self._end_ids < vocab_size])
        return np.unique(np.concatenate(parts))

    def _penalise(self, row: NDArray[np.float32]) -> None:
        token_ids, counts = self._counts.token_ids, self._counts.counts
        logits = row[token_ids]
        if self._params.repetition_penalty != 1:
            with np.errstate(over="ignore"):
                logits = np.where(logits > 0, logits / self._repetition, logits * self._repetition)
            logits = np.minimum(logits, _LARGEST)
        if _has_output_penalties(self._params):
            logits -= np.float32(self._params.frequency_penalty) * counts
            logits -= np.float32(self._params.presence_penalty) * (counts > 0)
        row[token_ids] = logits
