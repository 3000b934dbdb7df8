import math
from pathlib import Path
from typing import Any

import pytest

from training.config import SEED_LIMIT, Trained, TuneConfig
from training.errors import InvalidTuneConfig


def config(**changes: Any) -> TuneConfig:
    return TuneConfig(output=Path("out"), **changes)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("steps", 0, "at least 1"),
        ("batch_size", 0, "at least 1"),
        ("lora_rank", 0, "at least 1"),
        ("save_every", 0, "at least 1"),
        ("eval_tokens", 0, "at least 1"),
        ("sequence_length", 1, "at least 2"),
        ("alpha", 1.1, r"in \[0, 1\]"),
        ("alpha", math.nan, r"in \[0, 1\]"),
        ("distillation", -0.1, r"in \[0, 1\]"),
        ("min_learning_rate_share", 2, r"in \[0, 1\]"),
        ("gate_l1", -1.0, "at least 0"),
        ("gate_l1", math.inf, "at least 0"),
        ("weight_decay", -1.0, "at least 0"),
        ("warmup_steps", -1, "at least 0"),
        ("eval_every", -1, "at least 0"),
        ("learning_rate", 0.0, "above 0"),
        ("learning_rate", math.inf, "above 0"),
        ("max_grad_norm", 0.0, "above 0"),
        ("lora_alpha", 0.0, "above 0"),
        ("lora_alpha", math.nan, "above 0"),
        ("seed", -1, "at least 0"),
        ("seed", SEED_LIMIT, "below"),
        ("micro_batch_size", 3, r"a divisor of batch_size \(8\)"),
        ("micro_batch_size", 0, "a divisor"),
        ("dtype", "float16", "'bfloat16' or 'float32'"),
        ("device", "tpu", "'cpu' or 'cuda'"),
    ],
)
def test_refuses_a_value_by_name_and_says_what_is_allowed(field: str, value: object, allowed: str) -> None:
    with pytest.raises(InvalidTuneConfig, match=f"^{field} must be .*{allowed}.*, got") as error:
        config(**{field: value})
    assert error.value.field == field


def test_a_model_from_scratch_trains_all_weights_and_has_no_teacher() -> None:
    with pytest.raises(InvalidTuneConfig, match="trained must be 'all'"):
        config(from_scratch=True)
    with pytest.raises(InvalidTuneConfig, match="distillation must be 0"):
        config(from_scratch=True, trained=Trained.ALL, distillation=0.5)
    assert config(from_scratch=True, trained=Trained.ALL, distillation=0.0).from_scratch


@pytest.mark.parametrize(
    ("steps", "alpha", "expected"), [(100, 0.1, 90), (100, 0.0, 100), (100, 1.0, 0), (10, 0.25, 8), (4, 0.1, 4)]
)
def test_relu_runs_in_the_last_share_of_the_steps(steps: int, alpha: float, expected: int) -> None:
    assert config(steps=steps, alpha=alpha).relu_from == expected
