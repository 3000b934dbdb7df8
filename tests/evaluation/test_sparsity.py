"""Zeros by layer against gates computed with transformers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from engine import LLM, Activation, ActivationMode
from evaluation.sparsity import SparsityResult, measure_sparsity, zero_shares
from evaluation.texts import TextWindows
from tests.engine.models.tiny import make_tiny
from tests.evaluation.tiny_text import tiny_config, windows

SILU, RELU, STOCHASTIC = Activation(), Activation("relu"), Activation("stochastic", p=0.3)


@dataclass(frozen=True)
class Subject:
    llm: LLM
    model: PreTrainedModel

    @torch.inference_mode()
    def negative_gates(self, text: TextWindows, activation: torch.nn.Module) -> list[float]:
        """Share of negative gate values of each layer, with an activation in all layers."""
        layers = self.model.model.layers
        negative = np.zeros(len(layers))
        total = 0

        def count(index: int) -> Any:
            def hook(module: torch.nn.Module, inputs: Any, gate: torch.Tensor) -> None:
                negative[index] += int((gate < 0).sum())

            return hook

        hooks = [layer.mlp.gate_proj.register_forward_hook(count(index)) for index, layer in enumerate(layers)]
        for layer in layers:
            layer.mlp.act_fn = activation
        for ids in text.windows:
            self.model(torch.tensor([ids]))
            total += len(ids) * self.model.config.intermediate_size
        for handle in hooks:
            handle.remove()
        return (negative / total).tolist()


class PositiveSilu(torch.nn.Module):
    """RELU mode of a checkpoint whose positive branch is SILU."""

    def forward(self, gate: torch.Tensor) -> torch.Tensor:
        return torch.where(gate < 0, 0.0, torch.nn.functional.silu(gate))


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    path: Path = tmp_path_factory.mktemp("tiny")
    model = make_tiny("llama", path)
    with LLM(config=tiny_config(path)) as llm:
        yield Subject(llm, model)


def test_zeros_of_relu_are_its_negative_gates(subject: Subject) -> None:
    text = windows(40, 60, 7)
    expected = subject.negative_gates(text, PositiveSilu())

    result = measure_sparsity(subject.llm, text, RELU)

    assert (result.text, result.activation, result.tokens) == ("noise", RELU, 107)
    assert result.zeros == pytest.approx(expected, abs=1e-3)
    assert result.negative == result.zeros
    assert result.mean == pytest.approx(np.mean(expected), abs=1e-3)


def test_zeros_of_a_stochastic_activation_estimate_its_negative_gates(subject: Subject) -> None:
    text = windows(100, 100)
    # The first layer's gates depend on no activation, so those of SILU tell.
    expected = subject.negative_gates(text, torch.nn.SiLU())[0]

    result = measure_sparsity(subject.llm, text, STOCHASTIC)

    assert result.zeros[0] == pytest.approx(0.7 * expected, abs=0.02)
    assert result.negative is not None
    assert result.negative[0] == pytest.approx(expected, abs=0.02)


def test_silu_has_no_zeros_and_tells_nothing_about_signs(subject: Subject) -> None:
    result = measure_sparsity(subject.llm, windows(20), SILU)
    assert result.zeros == (0.0, 0.0, 0.0)
    assert result.negative is None


def test_what_was_computed_before_does_not_count(subject: Subject) -> None:
    first = measure_sparsity(subject.llm, windows(40), RELU)
    subject.llm.generate([1, 2, 3], activation=RELU)
    assert measure_sparsity(subject.llm, windows(40), RELU) == first


def test_a_mode_that_computed_nothing_has_no_shares(subject: Subject) -> None:
    stats = subject.llm.stats()
    with pytest.raises(ValueError, match="nothing was computed in mode 'relu'"):
        zero_shares(stats, stats, ActivationMode.RELU)


def test_json() -> None:
    zeros: Sequence[float] = (0.5, 0.75)
    record = SparsityResult("x", RELU, 10, tuple(zeros)).to_json()
    assert (record["activation"], record["mean"], record["zeros"]) == ("relu", 0.625, (0.5, 0.75))
