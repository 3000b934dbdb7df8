"""What a run writes: read by our engine, by transformers and by PEFT, all computing what was trained."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import (
    LLM,
    Activation,
    ActivationMode,
    ActivationSupport,
    DType,
    EngineConfig,
    MeasuredQuality,
    PositiveBranch,
    UntunedActivation,
)
from tests.engine.models.tiny import make_tiny
from tests.training.tiny_run import counting, settings, trainer
from training.config import Method, Trained, TuneConfig
from training.export import ADAPTER_WEIGHTS, CHECKPOINT_WEIGHTS, export, metadata, tuned_support
from training.models import forward_logits
from training.schedule import Constant, Linear, Mixture
from training.text import TextMixture, TokenizedText
from training.trainer import Text, Trainer

SILU, STOCHASTIC, RELU = ActivationMode
PROMPT = [40, 41, 50, 7, 200, 13, 99, 40, 41, 3, 45, 120]
P_OF_MODE = {SILU: None, RELU: torch.zeros(1)}
KINDS: list[dict[str, Any]] = [{"trained": trained} for trained in Trained]


def config_of(**changes: Any) -> TuneConfig:
    return settings(Path("model"), Path("out"), **changes)


def run(model: Path, output: Path, **changes: Any) -> Trainer:
    """Train far enough that the result differs from the model, and write it."""
    return finished(trainer(settings(model, output, learning_rate=3e-2, **changes)))


def finished(tiny: Trainer) -> Trainer:
    """The same trainer when it is done and its result is written."""
    for _ in tiny.run():
        pass
    measurements = tiny.log.measurements
    export(tiny.loaded, tiny.config, measurements[-1] if measurements else None, tiny.config.output)
    return tiny


def read_metadata(folder: Path) -> dict[str, str]:
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        header: dict[str, str] = file.metadata()
    return header


@torch.no_grad()
def trained_logprobs(tiny: Trainer, mode: ActivationMode) -> Tensor:
    """float64 [tokens - 1]: of the trained model in memory, with its adapter rounded as it is stored."""
    for weight in tiny.loaded.trainable().values() if tiny.config.trained is Trained.LORA else ():
        weight.copy_(weight.bfloat16())
    ids = torch.tensor([PROMPT])
    with tiny.control.running(P_OF_MODE[mode], seed=0):
        logits = forward_logits(tiny.loaded.model, ids)[0].double()
    return logits.log_softmax(-1)[torch.arange(len(PROMPT) - 1), ids[0, 1:]]


def engine_logprobs(llm: LLM, mode: ActivationMode) -> Tensor:
    (score,) = llm.score(PROMPT, Activation(mode))
    return torch.tensor(score.logprobs, dtype=torch.float64)


def start(model: Path, adapter: Path | None = None) -> LLM:
    return LLM(
        config=EngineConfig(
            model=str(model),
            adapter=None if adapter is None else str(adapter),
            dtype=DType.FLOAT32,
            kv_cache_mib=8,
            threads=1,
        )
    )


class TestEngine:
    @pytest.mark.parametrize("branch", PositiveBranch)
    @pytest.mark.parametrize("family", ["llama", "smollm2-tied", "qwen3"])
    @pytest.mark.parametrize("changes", KINDS, ids=list(Trained))
    def test_computes_what_was_trained(
        self, changes: dict[str, Any], family: str, branch: PositiveBranch, tmp_path: Path
    ) -> None:
        make_tiny(family, tmp_path / "model")
        tiny = run(tmp_path / "model", tmp_path / "out", positive_branch=branch, **changes)
        adapted = tiny.config.trained is Trained.LORA
        folders = (tmp_path / "model", tmp_path / "out") if adapted else (tmp_path / "out", None)

        with start(tmp_path / "model") as llm:
            untouched = engine_logprobs(llm, SILU)
        with start(*folders) as llm:
            assert llm.info.support == tuned_support(tiny.config)
            for mode in (SILU, RELU):
                ours, expected = engine_logprobs(llm, mode), trained_logprobs(tiny, mode)
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
                assert (ours - untouched).abs().max() > 0.1

    def test_allows_the_tuned_modes_and_no_others(self, tmp_path: Path) -> None:
        make_tiny("llama", tmp_path / "model")
        run(tmp_path / "model", tmp_path / "out", p=Linear(0.9, 0.5))
        with start(tmp_path / "model", tmp_path / "out") as llm:
            for activation in (Activation(RELU), Activation(STOCHASTIC, p=0.5), Activation(STOCHASTIC, p=0.9)):
                assert len(llm.score(PROMPT, activation)) == 1
            for activation in (Activation(SILU), Activation(STOCHASTIC, p=0.4), Activation(STOCHASTIC, p=1.0)):
                with pytest.raises(UntunedActivation, match="not tuned for"):
                    llm.score(PROMPT, activation)


class TestPeft:
    def test_loads_the_adapter(self, tmp_path: Path) -> None:
        make_tiny("qwen2", tmp_path / "model")
        tiny = run(tmp_path / "model", tmp_path / "out", lora_rank=3, lora_alpha=12.0)
        adapted = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32), tmp_path / "out"
        )
        with torch.no_grad():
            logits = adapted(torch.tensor([PROMPT])).logits[0].double()
        logprobs = logits.log_softmax(-1)[torch.arange(len(PROMPT) - 1), torch.tensor(PROMPT[1:])]
        torch.testing.assert_close(logprobs, trained_logprobs(tiny, SILU), rtol=1e-5, atol=1e-5)

    def test_settings_name_the_model_and_no_folder_of_this_machine(self, tmp_path: Path) -> None:
        make_tiny("llama", tmp_path / "model")
        run(tmp_path / "model", tmp_path / "out")
        text = (tmp_path / "out" / "adapter_config.json").read_text()
        document = json.loads(text)
        assert str(tmp_path) not in text
        assert document["base_model_name_or_path"] == "model"
        assert document["target_modules"] == ["down_proj", "gate_proj", "up_proj"]
        assert (document["r"], document["lora_alpha"], document["inference_mode"]) == (4, 4, True)
        assert list(document) == sorted(document)

    def test_a_run_that_is_repeated_writes_the_same(self, tmp_path: Path) -> None:
        make_tiny("llama", tmp_path / "model")
        one, two = tmp_path / "one", tmp_path / "two"
        for output in (one, two):
            run(tmp_path / "model", output)
        assert (one / "adapter_config.json").read_bytes() == (two / "adapter_config.json").read_bytes()
        assert read_metadata(one) == read_metadata(two)
        tensors = load_file(two / ADAPTER_WEIGHTS)
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(one / ADAPTER_WEIGHTS).items())


class TestCheckpoint:
    @pytest.mark.parametrize("family", ["llama", "smollm2-tied", "smollm3"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_transformers_loads_it_with_its_tokenizer(self, dtype: str, family: str, tmp_path: Path) -> None:
        make_tiny(family, tmp_path / "model")
        tiny = run(tmp_path / "model", tmp_path / "out", trained=Trained.FFN, dtype=dtype)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        expected = {name: weight.to(loaded.dtype) for name, weight in tiny.loaded.model.state_dict().items()}
        assert loaded.dtype == getattr(torch, dtype)
        assert loaded.state_dict().keys() == expected.keys()
        assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())
        for text in ("the hat", "<|im_start|>"):
            ours, before = (AutoTokenizer.from_pretrained(tmp_path / name)(text) for name in ("out", "model"))
            assert ours["input_ids"] == before["input_ids"]

    @pytest.mark.parametrize(("family", "tied"), [("smollm2-tied", True), ("llama", False)])
    def test_tied_embeddings_are_stored_once(self, family: str, tied: bool, tmp_path: Path) -> None:
        make_tiny(family, tmp_path / "model")
        run(tmp_path / "model", tmp_path / "out", trained=Trained.ALL)
        with safe_open(tmp_path / "out" / CHECKPOINT_WEIGHTS, framework="pt") as file:
            assert ("lm_head.weight" not in file.keys()) is tied  # noqa: SIM118  # not a dictionary
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied

    def test_a_model_from_scratch_can_be_served(self, tmp_path: Path) -> None:
        make_tiny("llama", tmp_path / "model")
        tiny = run(tmp_path / "model", tmp_path / "out", trained=Trained.ALL, from_scratch=True)
        with start(tmp_path / "out") as llm:
            torch.testing.assert_close(engine_logprobs(llm, RELU), trained_logprobs(tiny, RELU), rtol=1e-4, atol=1e-4)

    def test_gradient_checkpointing_leaves_no_trace(self, tmp_path: Path) -> None:
        make_tiny("llama", tmp_path / "model")
        for name, checkpointing in (("kept", False), ("recomputed", True)):
            run(tmp_path / "model", tmp_path / name, trained=Trained.FFN, gradient_checkpointing=checkpointing)
        kept, recomputed = ((tmp_path / name / "config.json").read_text() for name in ("kept", "recomputed"))
        assert kept == recomputed


class TestMetadata:
    @pytest.mark.parametrize("trained", [Trained.LORA, Trained.FFN])
    def test_says_what_was_tuned_and_measured(self, trained: Trained, tmp_path: Path) -> None:
        make_tiny("llama", tmp_path / "model")
        tiny = run(tmp_path / "model", tmp_path / "out", trained=trained, positive_branch=PositiveBranch.IDENTITY)
        header, last = read_metadata(tmp_path / "out"), tiny.log.measurements[-1]
        support, quality = ActivationSupport.from_metadata(header), MeasuredQuality.from_metadata(header)
        assert support == ActivationSupport((SILU, STOCHASTIC, RELU), 0.0, 1.0, PositiveBranch.IDENTITY, tuned=True)
        assert quality.perplexity.keys() == {"held out"}
        assert quality.perplexity["held out"] == pytest.approx(last.perplexity["held out"], abs=5e-4)
        assert quality.sparsity == pytest.approx(last.zeros, abs=5e-5)

    def test_says_nothing_about_quality_that_was_not_measured(self, tmp_path: Path) -> None:
        make_tiny("llama", tmp_path / "model")
        text = Text(TextMixture([(counting(400), 1.0)], seed=3), {}, "not measured")
        finished(Trainer(settings(tmp_path / "model", tmp_path / "out"), lambda tokenizer: text, lambda line: None))
        header = read_metadata(tmp_path / "out")
        assert ActivationSupport.from_metadata(header).tuned
        assert MeasuredQuality.from_metadata(header) == MeasuredQuality()

    @pytest.mark.parametrize(
        ("changes", "modes", "p_range"),
        [
            ({"method": Method.SWI_FT}, {SILU, RELU}, None),
            ({"method": Method.SWI_FT, "alpha": 1.0}, {RELU}, None),
            ({"method": Method.SWI_FT, "alpha": 0.0}, {SILU}, None),
            ({"method": Method.SWI_FT, "steps": 4, "alpha": 0.1}, {SILU}, None),  # a tenth of four steps is none
            ({"p": Constant(0.7)}, {STOCHASTIC, RELU}, (0.7, 0.7)),
            ({"p": Constant(0.1234567)}, {STOCHASTIC, RELU}, (0.1234567, 0.1234567)),
            ({"p": Constant(0.7), "alpha": 0.0}, {STOCHASTIC}, (0.7, 0.7)),
            ({"p": Constant(0.7), "steps": 4, "alpha": 0.1}, {STOCHASTIC}, (0.7, 0.7)),
            ({"p": Constant(0.7), "alpha": 1.0}, {RELU}, None),
            ({"p": Linear(1.0, 0.3)}, {SILU, STOCHASTIC, RELU}, (0.3, 1.0)),
            ({"p": Linear(0.9, 0.0), "alpha": 0.0}, {STOCHASTIC, RELU}, (0.0, 0.9)),
            ({"p": Mixture(0.5, 0.25, 0.25), "alpha": 0.0}, {SILU, STOCHASTIC, RELU}, (0.0, 1.0)),
            ({"p": Mixture(0.5, 0.5, 0.0), "alpha": 0.0}, {SILU, RELU}, None),
            ({"p": Mixture(0.0, 1.0, 0.0), "alpha": 0.0}, {SILU}, None),
        ],
    )
    @pytest.mark.parametrize("branch", PositiveBranch)
    def test_supports_the_modes_that_were_trained(
        self,
        branch: PositiveBranch,
        changes: dict[str, Any],
        modes: set[ActivationMode],
        p_range: tuple[float, float] | None,
    ) -> None:
        support = tuned_support(replace(config_of(**changes), positive_branch=branch))
        assert set(support.modes) == modes
        assert (STOCHASTIC in modes) is (p_range is not None)
        if p_range is not None:
            assert (support.min_p, support.max_p) == p_range
        assert ActivationSupport.from_metadata(metadata(support, None)) == support


@pytest.mark.slow
def test_an_adapter_of_the_default_model_is_served_as_it_was_trained(tmp_path: Path) -> None:
    """The model is a GGUF file, which transformers and our engine read with different code."""
    held_out = TokenizedText("tokens", counting(64).token_ids)
    text = Text(TextMixture([(counting(400), 1.0)], seed=3), {"counting": held_out}, "default model")
    config = replace(
        config_of(steps=1, batch_size=1, dtype="float32", eval_every=0, eval_tokens=16), model=None, output=tmp_path
    )
    tiny = finished(Trainer(config, lambda tokenizer: text, lambda line: None))
    with LLM(config=EngineConfig(adapter=str(tmp_path), dtype=DType.FLOAT32, kv_cache_mib=16, threads=1)) as llm:
        for mode in (SILU, RELU):
            expected = trained_logprobs(tiny, mode)
            torch.testing.assert_close(engine_logprobs(llm, mode), expected, rtol=1e-3, atol=1e-3)
        assert llm.info.quality.perplexity.keys() == {"counting"}
