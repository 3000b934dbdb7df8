"""Our activation inside transformers' modules, against its definition in the engine and against plain autograd."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from engine import Activation, ActivationMode, PositiveBranch
from engine.activation import apply_activation
from tests.engine.models.tiny import SHAPE, make_tiny, randomize
from tests.engine.steps import activation_rows
from tests.training.tiny_run import model_in_memory, settings
from training.activation import ActivationControl, ControlledActivation, install
from training.config import Trained
from training.errors import UnsupportedModel
from training.models import forward_logits, load_model

CPU = torch.device("cpu")
PER_SEQUENCE = [ActivationMode.SILU, ActivationMode.RELU, ActivationMode.RELU, ActivationMode.SILU]
P_OF_MODE = {ActivationMode.SILU: 1.0, ActivationMode.RELU: 0.0}
P = torch.tensor([P_OF_MODE[mode] for mode in PER_SEQUENCE])
every_branch = pytest.mark.parametrize("branch", PositiveBranch)


def build(family: str) -> Any:
    torch.manual_seed(0)
    if family != "phi3":
        return model_in_memory(family)
    model = Phi3ForCausalLM(Phi3Config(**SHAPE)).float().eval()
    randomize(model)
    return model


def token_ids(sequences: int = len(PER_SEQUENCE), tokens: int = 12) -> Tensor:
    return torch.randint(SHAPE["vocab_size"], (sequences, tokens), generator=torch.Generator().manual_seed(1))


def gate_values(sequences: int, tokens: int = 8, intermediate: int = 32, seed: int = 0) -> Tensor:
    """float64, so that finite differences say something."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sequences, tokens, intermediate, generator=generator, dtype=torch.float64)


def control_of(branch: PositiveBranch = PositiveBranch.SILU, layers: int = 3) -> ActivationControl:
    return ActivationControl(layers, branch, CPU)


class DefinedActivation(nn.Module):
    """The engine's definition, one mode for each sequence of a batch."""

    def __init__(self, branch: PositiveBranch) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, gate: Tensor) -> Tensor:
        rows = [
            activation_rows([Activation(mode)] * gate.shape[1], range(gate.shape[1]), self.branch)
            for mode in PER_SEQUENCE
        ]
        return torch.stack([apply_activation(one, of, layer=0) for one, of in zip(gate, rows, strict=True)])


class TestValues:
    @every_branch
    @pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral-swa", "smollm3", "phi3"])
    def test_a_model_computes_what_the_definition_says(self, family: str, branch: PositiveBranch) -> None:
        model = build(family)
        defined = copy.deepcopy(model)
        for module in defined.modules():
            for name in ("act_fn", "activation_fn"):
                if hasattr(module, name):
                    setattr(module, name, DefinedActivation(branch))
        control = install(model, branch)

        with torch.no_grad(), control.running(P, seed=0):
            logits = forward_logits(model, token_ids())
        with torch.no_grad():
            expected = forward_logits(defined, token_ids())
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    @every_branch
    def test_outside_of_a_run_it_is_silu(self, branch: PositiveBranch) -> None:
        model = build("llama")
        with torch.no_grad():
            before = forward_logits(model, token_ids())
            control = install(model, branch)
            after = forward_logits(model, token_ids())
            with control.running(None, seed=0):
                inside = forward_logits(model, token_ids())
        assert torch.equal(before, after)
        assert torch.equal(before, inside)

    @every_branch
    def test_values_that_pass_and_values_that_do_not(self, branch: PositiveBranch) -> None:
        gate = gate_values(2)
        control = control_of(branch)
        with control.running(torch.tensor([0.5, 0.5]), seed=0):
            result = control.apply(gate, 0)
        positive = gate if branch is PositiveBranch.IDENTITY else functional.silu(gate)
        kept = (gate < 0) & (result != 0)
        assert torch.equal(result[gate >= 0], positive[gate >= 0])
        torch.testing.assert_close(result[kept], functional.silu(gate)[kept])
        assert 0 < kept.sum() < (gate < 0).sum()

    def test_type_and_shape_stay(self) -> None:
        gate = gate_values(2).bfloat16()
        control = control_of()
        with control.running(torch.tensor([0.5, 0.0]), seed=0):
            result = control.apply(gate, 0)
        assert result.dtype == torch.bfloat16
        assert result.shape == gate.shape


class TestDraws:
    SHARES = (0.1, 0.5, 0.9)

    def draw(self, p: tuple[float, ...], seed: int = 5, layer: int = 0) -> tuple[Tensor, Tensor]:
        """Which values are negative, and which of them pass; the same gate values for all sequences."""
        gate = gate_values(1, tokens=64, intermediate=256).expand(len(p), -1, -1)
        control = control_of()
        with control.running(torch.tensor(p), seed=seed):
            result = control.apply(gate, layer)
        return gate < 0, (gate < 0) & (result != 0)

    def test_each_sequence_keeps_its_own_share_of_negative_values(self) -> None:
        negative, kept = self.draw(self.SHARES)
        for share, n, k in zip(self.SHARES, negative.sum((1, 2)).tolist(), kept.sum((1, 2)).tolist(), strict=True):
            assert abs(k - share * n) < 4 * (n * share * (1 - share)) ** 0.5

    def test_ends_of_the_range_draw_nothing(self) -> None:
        negative, kept = self.draw((1.0, 0.0, 0.5))
        assert torch.equal(kept[0], negative[0])
        assert not kept[1].any()

    def test_the_same_seed_draws_the_same(self) -> None:
        assert torch.equal(self.draw(self.SHARES)[1], self.draw(self.SHARES)[1])

    def test_seeds_layers_and_sequences_draw_independently(self) -> None:
        kept = [
            self.draw((0.5, 0.5))[1][0],
            self.draw((0.5, 0.5))[1][1],
            self.draw((0.5, 0.5), seed=6)[1][0],
            self.draw((0.5, 0.5), layer=1)[1][0],
        ]
        negative = self.draw((0.5,))[0][0]
        for index, one in enumerate(kept):
            for other in kept[:index]:
                together = (one & other).sum() / negative.sum()
                assert together.item() == pytest.approx(0.25, abs=0.02)

    def test_a_seed_of_any_size_is_a_seed(self) -> None:
        _, kept = self.draw((0.5,), seed=(2**63 - 1) * 1_000_003 * 1009)
        assert kept.any()


class TestGradients:
    """p = 1, 0 and 0.5 side by side, with and without pressure on the RELU sequence."""

    P = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    L1 = 3.0

    def plain(self, gate: Tensor, kept: Tensor, branch: PositiveBranch) -> Tensor:
        """act(gate) in operations that autograd knows; `kept` says which negative values pass."""
        silu = functional.silu(gate)
        identity = (self.P < 1).view(-1, 1, 1) & (branch is PositiveBranch.IDENTITY)
        return torch.where(gate >= 0, torch.where(identity, gate, silu), torch.where(kept, silu, 0.0))

    def penalty(self, gate: Tensor, branch: PositiveBranch) -> Tensor:
        """L1 * mean over tokens and neurons of |act(gate)| in the RELU sequences of the batch."""
        act = self.plain(gate, torch.zeros_like(gate, dtype=torch.bool), branch)
        return self.L1 * act[self.P == 0].abs().sum() / gate.numel()

    def ours(self, gate: Tensor, upstream: Tensor, branch: PositiveBranch, l1: float) -> tuple[Tensor, Tensor]:
        """Value, and gradient of `(act * upstream).sum()` and the pressure."""
        leaf = gate.clone().requires_grad_()
        control = control_of(branch)
        with control.running(self.P, seed=2, l1=l1):
            value = control.apply(leaf, 0)
            (value * upstream).sum().backward()
        assert leaf.grad is not None
        return value.detach(), leaf.grad

    @every_branch
    @pytest.mark.parametrize("l1", [0.0, L1])
    def test_are_those_of_autograd_through_the_plain_formula(self, branch: PositiveBranch, l1: float) -> None:
        gate, upstream = gate_values(3), gate_values(3, seed=1)
        value, gradient = self.ours(gate, upstream, branch, l1)

        leaf = gate.clone().requires_grad_()
        expected = self.plain(leaf, (gate < 0) & (value != 0), branch)
        objective = (expected * upstream).sum() + (self.penalty(leaf, branch) if l1 else 0.0)
        objective.backward()

        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(gradient, leaf.grad)

    @every_branch
    def test_pressure_is_the_slope_of_the_mean_of_act(self, branch: PositiveBranch) -> None:
        gate = gate_values(3, tokens=2, intermediate=6)
        _, gradient = self.ours(gate, torch.zeros_like(gate), branch, self.L1)
        step = 1e-6
        slopes = torch.empty_like(gate)
        for index in range(gate.numel()):
            change = torch.zeros_like(gate).view(-1)
            change[index] = step
            change = change.view_as(gate)
            rise = self.penalty(gate + change, branch) - self.penalty(gate - change, branch)
            slopes.view(-1)[index] = rise / (2 * step)
        torch.testing.assert_close(gradient, slopes, rtol=1e-6, atol=1e-8)
        assert gradient[1].any()
        assert not gradient[[0, 2]].any()

    def test_pressure_alone_makes_zeros(self) -> None:
        weight = gate_values(1, tokens=1).requires_grad_()
        control = control_of()
        for _ in range(200):
            weight.grad = None
            with control.running(torch.tensor([0.0]), seed=0, l1=1.0):
                control.apply(weight, 0).sum().mul(0.0).backward()
            assert weight.grad is not None
            with torch.no_grad():
                weight -= 2.0 * weight.grad
        start = functional.silu(gate_values(1, tokens=1).relu()).sum()
        assert functional.silu(weight.detach().relu()).sum() < 0.2 * start


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_tiny("llama", folder, attention_dropout=0.5)
    return folder


class TestGradientCheckpointing:
    def gradients(self, folder: Path, trained: Trained, **changes: Any) -> dict[str, Tensor]:
        loaded = load_model(settings(folder, folder, trained=trained, **changes), lambda line: None)
        control = install(loaded.model, PositiveBranch.IDENTITY)
        ids = token_ids(3)
        with torch.no_grad():  # a fresh adapter changes nothing, and half of its weights have no gradient
            for name, weight in loaded.trainable().items():
                if "lora_B" in name:
                    weight.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(0))
        with control.running(torch.tensor([1.0, 0.0, 0.5]), seed=3, l1=0.5):
            forward_logits(loaded.model, ids).logsumexp(-1).mean().backward()
        return {name: weight.grad for name, weight in loaded.trainable().items() if weight.grad is not None}

    @pytest.mark.parametrize("trained", Trained)
    def test_gives_the_same_gradients(self, trained: Trained, tiny_folder: Path) -> None:
        kept = self.gradients(tiny_folder, trained)
        recomputed = self.gradients(tiny_folder, trained, gradient_checkpointing=True)
        assert kept.keys() == recomputed.keys()
        assert all(gradient.any() for gradient in kept.values())
        for name, gradient in kept.items():
            torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-8)


class TestCounts:
    def test_zeros_of_relu_sequences_are_counted_by_layer(self) -> None:
        gate = gate_values(3)
        control = control_of()
        with control.running(torch.tensor([1.0, 0.0, 0.5]), seed=0):
            control.apply(gate, 1)
            control.apply(gate, 1)
        assert control.zeros.tolist() == [0, 2 * (gate[1] < 0).sum().item(), 0]
        assert control.elements.tolist() == [0, 2 * gate[1].numel(), 0]
        control.reset_counts()
        assert not control.zeros.any()
        assert not control.elements.any()

    def test_silu_counts_nothing(self) -> None:
        control = control_of()
        with control.running(None, seed=0):
            control.apply(gate_values(2), 0)
        assert not control.elements.any()


class TestInstall:
    def test_layers_are_numbered_from_the_first(self) -> None:
        model = build("llama")
        install(model, PositiveBranch.SILU)
        activations = [layer.mlp.act_fn for layer in model.model.layers]
        assert all(isinstance(activation, ControlledActivation) for activation in activations)
        assert [activation._layer for activation in activations] == list(range(SHAPE["num_hidden_layers"]))

    def test_weights_keep_their_names(self) -> None:
        model = build("llama")
        names = list(model.state_dict())
        install(model, PositiveBranch.SILU)
        assert list(model.state_dict()) == names

    @pytest.mark.parametrize(
        "model",
        [
            lambda: GemmaForCausalLM(GemmaConfig(**SHAPE, head_dim=16)),
            lambda: model_in_memory("llama", hidden_act="gelu"),
            lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)),
        ],
        ids=["gemma", "llama with gelu", "gpt2"],
    )
    def test_refuses_a_model_without_silu(self, model: Any) -> None:
        with pytest.raises(UnsupportedModel, match="stochastic activations are defined for SILU"):
            install(model(), PositiveBranch.SILU)

    @pytest.mark.parametrize(
        "model",
        [
            lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=2)),
            lambda: Qwen2MoeForCausalLM(
                Qwen2MoeConfig(
                    **SHAPE,
                    num_experts=2,
                    num_experts_per_tok=1,
                    moe_intermediate_size=16,
                    shared_expert_intermediate_size=16,
                )
            ),
        ],
        ids=["mixtral", "qwen2 with a shared expert"],
    )
    def test_refuses_a_mixture_of_experts(self, model: Any) -> None:
        with pytest.raises(UnsupportedModel, match="experts"):
            install(model(), PositiveBranch.SILU)

    def test_refuses_a_model_with_a_layer_that_is_not_gated(self) -> None:
        model = build("llama")
        model.model.layers[1].mlp = nn.Linear(64, 64)
        with pytest.raises(UnsupportedModel, match="2 gated feed-forward blocks were found in 3 layers"):
            install(model, PositiveBranch.SILU)
