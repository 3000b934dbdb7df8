"""The training loop on tiny models: the same result however often it is killed, and a loss that falls."""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tests.engine.models.tiny import make_tiny
from tests.training.tiny_run import counting, read_text, settings, trained_weights, trainer
from training.config import Method, Trained, TuneConfig
from training.errors import Diverged, InvalidTuneConfig, ResumeError, TextError, UnsupportedModel
from training.log import Measurement, StepRecord
from training.schedule import Constant, Linear, Mixture
from training.text import TextMixture
from training.trainer import Text, Trainer, held_out_windows

ALTERNATING = Mixture(relu=0.5, silu=0.5, uniform=0.0)
RUNS: list[dict[str, Any]] = [
    {"trained": Trained.LORA, "dtype": "bfloat16", "distillation": 0.5, "gate_l1": 0.01},
    {"trained": Trained.FFN, "weight_decay": 0.1, "micro_batch_size": 2},
    {"trained": Trained.ALL, "dtype": "bfloat16", "method": Method.SWI_FT, "gradient_checkpointing": True},
    {"trained": Trained.ALL, "from_scratch": True},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2-tied")
    make_tiny("smollm2-tied", folder, attention_dropout=0.3)
    return folder


def run(config: TuneConfig, steps: int | None = None) -> Trainer:
    """Train to the end, or `steps` steps and no further: whoever is killed does nothing more."""
    tiny = trainer(config)
    for number, _ in enumerate(tiny.run(), start=1):
        if number == steps:
            break
    return tiny


def without_time(records: list[StepRecord]) -> list[str]:
    return [repr(replace(record, seconds=0.0)) for record in records]  # nan is not equal to itself, its text is


def assert_same(ours: Trainer, expected: Trainer) -> None:
    weights = trained_weights(expected)
    assert trained_weights(ours).keys() == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in trained_weights(ours).items())
    assert without_time(ours.log.steps) == without_time(expected.log.steps)
    assert ours.log.measurements == expected.log.measurements


def files(folder: Path) -> list[str]:
    return (folder / "measurements.jsonl").read_text().splitlines()


@pytest.mark.parametrize("changes", RUNS, ids=["lora", "ffn", "all", "scratch"])
class TestResume:
    def test_killed_after_any_step_it_comes_to_the_same_end(
        self, changes: dict[str, Any], model: Path, tmp_path: Path
    ) -> None:
        uninterrupted = run(settings(model, tmp_path / "whole", **changes))
        assert len(uninterrupted.log.steps) == uninterrupted.config.steps
        for killed_after in range(1, uninterrupted.config.steps + 1):
            folder = tmp_path / f"killed after {killed_after}"
            run(settings(model, folder, **changes), killed_after)
            resumed = trainer(settings(model, folder, **changes))
            assert resumed.step == (killed_after if killed_after == 5 else killed_after // 2 * 2)
            for _ in resumed.run():
                pass
            assert_same(resumed, uninterrupted)
            assert files(folder) == files(tmp_path / "whole")

    def test_killed_in_a_save_it_comes_to_the_same_end(
        self, changes: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        uninterrupted = run(settings(model, tmp_path / "whole", **changes))
        config = settings(model, tmp_path / "killed", **changes)
        killed = trainer(config)
        saves: list[object] = []
        replace_file = os.replace

        def kill_in_the_second(*arguments: Any) -> None:
            saves.append(arguments)
            if len(saves) == 2:
                raise KeyboardInterrupt
            replace_file(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", kill_in_the_second)
            with pytest.raises(KeyboardInterrupt):
                list(killed.run())
        assert len(killed.log.steps) == 4
        assert_same(run(config), uninterrupted)


class TestResumeOrNot:
    def test_a_finished_run_does_nothing_more(self, model: Path, tmp_path: Path) -> None:
        finished = run(settings(model, tmp_path))
        again = trainer(settings(model, tmp_path))
        assert list(again.run()) == []
        assert_same(again, finished)

    def test_where_and_how_often_it_is_saved_and_measured_may_change(self, model: Path, tmp_path: Path) -> None:
        run(settings(model, tmp_path / "here"), 2)
        (tmp_path / "here").rename(tmp_path / "there")
        resumed = trainer(settings(model, tmp_path / "there", save_every=1, eval_every=0, eval_tokens=16))
        assert resumed.step == 2

    @pytest.mark.parametrize(
        "changes",
        [{"seed": 1}, {"p": Constant(0.5)}, {"steps": 6}, {"learning_rate": 1e-3}, {"gate_l1": 0.5}, {"lora_rank": 8}],
        ids=lambda changes: next(iter(changes)),
    )
    def test_other_settings_are_refused(self, changes: dict[str, Any], model: Path, tmp_path: Path) -> None:
        run(settings(model, tmp_path), 2)
        with pytest.raises(ResumeError, match="other settings"):
            trainer(settings(model, tmp_path, **changes))

    def test_other_text_is_refused(self, model: Path, tmp_path: Path) -> None:
        run(settings(model, tmp_path), 2)
        with pytest.raises(ResumeError, match="other text"):
            Trainer(
                settings(model, tmp_path),
                lambda tokenizer: replace(read_text(tokenizer), fingerprint="changed"),
                lambda line: None,
            )


class TestSteps:
    def test_each_method_runs_what_it_says(self, model: Path, tmp_path: Path) -> None:
        schedules: dict[str, dict[str, Any]] = {
            "swi+ft": {"method": Method.SWI_FT},
            "constant": {"p": Constant(0.7)},
            "linear": {"p": Linear(1.0, 0.5)},
        }
        drawn = {}
        for name, changes in schedules.items():
            tiny = trainer(settings(model, tmp_path / name, alpha=0.4, **changes))
            drawn[name] = [sorted(set(tiny.draw_p(step).tolist())) for step in range(5)]
        assert drawn["swi+ft"] == [[1.0], [1.0], [1.0], [0.0], [0.0]]
        assert drawn["constant"] == [[np.float32(0.7)]] * 3 + [[0.0]] * 2
        assert drawn["linear"] == [[1.0], [0.75], [0.5], [0.0], [0.0]]

    def test_the_log_of_swi_ft_has_zeros_from_the_switch_on(self, model: Path, tmp_path: Path) -> None:
        tiny = run(settings(model, tmp_path, method=Method.SWI_FT))
        switch = tiny.config.relu_from
        assert all(math.isnan(record.zeros) for record in tiny.log.steps[:switch])
        assert all(0.3 < record.zeros < 0.7 for record in tiny.log.steps[switch:])

    @pytest.mark.parametrize("trained", Trained)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_distillation_of_silu_starts_at_zero(
        self, dtype: str, trained: Trained, model: Path, tmp_path: Path
    ) -> None:
        config = settings(model, tmp_path, trained=trained, dtype=dtype, method=Method.SWI_FT, distillation=1.0)
        first = next(trainer(config).run())
        assert first.distillation == pytest.approx(0.0, abs=1e-6 if dtype == "float32" else 1e-3)
        assert first.loss == pytest.approx(first.distillation, abs=1e-7)
        assert first.next_token > 1

    def test_a_mixture_of_losses_is_logged_as_such(self, model: Path, tmp_path: Path) -> None:
        for record in run(settings(model, tmp_path, distillation=0.25)).log.steps:
            assert record.loss == pytest.approx(0.75 * record.next_token + 0.25 * record.distillation, rel=1e-5)

    @pytest.mark.parametrize("gate_l1", [0.0, 5.0])
    def test_micro_batches_add_up_to_the_gradient_of_the_batch(
        self, gate_l1: float, model: Path, tmp_path: Path
    ) -> None:
        gradients: list[dict[str, Tensor]] = []
        for micro_batch_size in (None, 2, 1):
            config = settings(
                model,
                tmp_path / str(micro_batch_size),
                trained=Trained.ALL,
                p=ALTERNATING,
                distillation=0.5,
                gate_l1=gate_l1,
                max_grad_norm=1e9,
                micro_batch_size=micro_batch_size,
            )
            tiny = trainer(config)
            next(tiny.run())
            gradients.append(
                {name: weight.grad for name, weight in tiny.loaded.trainable().items() if weight.grad is not None}
            )
        whole = gradients[0]
        assert len(whole) == len(tiny.loaded.trainable())
        for parts in gradients[1:]:
            for name, gradient in whole.items():
                torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)

    def test_gradients_are_scaled_down_to_the_norm(self, model: Path, tmp_path: Path) -> None:
        tiny = trainer(settings(model, tmp_path, max_grad_norm=0.01))
        record = next(tiny.run())
        norm = torch.stack([w.grad.norm() for w in tiny.loaded.trainable().values() if w.grad is not None]).norm()
        assert record.gradient_norm > 0.01
        assert norm.item() == pytest.approx(0.01, rel=1e-2)

    @pytest.mark.parametrize("trained", Trained)
    def test_only_what_is_named_is_trained(self, trained: Trained, model: Path, tmp_path: Path) -> None:
        tiny = run(settings(model, tmp_path, trained=trained, weight_decay=0.1))
        before = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
        if trained is Trained.LORA:
            assert all("lora_" in name for name in trained_weights(tiny))
            after = {
                name.removeprefix("base_model.model.").replace(".base_layer", ""): weight
                for name, weight in tiny.loaded.model.state_dict().items()
            }
        else:
            after = tiny.loaded.model.state_dict()
        changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
        blocks = {name for name in before if ".mlp." in name}
        assert changed == {Trained.LORA: set(), Trained.FFN: blocks, Trained.ALL: set(before)}[trained]

    def test_norms_do_not_decay(self, model: Path, tmp_path: Path) -> None:
        weights = {}
        for decay in (0.0, 10.0):
            tiny = trainer(settings(model, tmp_path / str(decay), trained=Trained.ALL, weight_decay=decay))
            next(tiny.run())
            weights[decay] = trained_weights(tiny)
        differ = {name for name, weight in weights[0.0].items() if not torch.equal(weight, weights[10.0][name])}
        assert differ == {name for name, weight in weights[0.0].items() if weight.ndim == 2}


LONG: dict[str, Any] = {"steps": 30, "batch_size": 8, "eval_every": 0, "save_every": 30}


class TestLearning:
    @pytest.mark.parametrize(
        "changes",
        [
            {"trained": Trained.LORA, "dtype": "bfloat16"},
            {"trained": Trained.FFN},
            {"trained": Trained.ALL, "from_scratch": True},
            {"trained": Trained.ALL, "method": Method.SWI_FT},
        ],
        ids=["lora", "ffn", "scratch", "swi+ft"],
    )
    def test_micro_training_lowers_the_loss_and_perplexity_in_every_mode(
        self, changes: dict[str, Any], model: Path, tmp_path: Path
    ) -> None:
        tiny = Trainer(settings(model, tmp_path, **LONG, **changes), self.read_learnable, lambda line: None)
        records = list(tiny.run())
        assert records[-1].loss < 0.5 * records[0].loss
        before, after = tiny.log.measurements
        for mode in ("silu", "relu"):
            assert after.perplexity["same"][mode] < 0.5 * before.perplexity["same"][mode]

    @staticmethod
    def read_learnable(tokenizer: Any) -> Text:
        return Text(TextMixture([(counting(400), 1.0)], seed=3), {"same": counting(64)}, "learnable")

    def test_distillation_brings_relu_closer_to_the_untouched_model(self, model: Path, tmp_path: Path) -> None:
        tiny = run(settings(model, tmp_path, **LONG, distillation=1.0, p=Mixture(1.0, 0.0, 0.0)))
        assert tiny.log.steps[-1].distillation < 0.5 * tiny.log.steps[0].distillation

    def test_pressure_makes_zeros(self, model: Path, tmp_path: Path) -> None:
        zeros = {}
        for pressure in (0.0, 20.0):
            config = settings(
                model, tmp_path / str(pressure), **LONG, gate_l1=pressure, p=ALTERNATING, trained=Trained.FFN
            )
            zeros[pressure] = run(config).log.steps[-1].zeros
        assert zeros[20.0] > zeros[0.0] + 0.05


class ReluOfSilu(nn.Module):
    """RELU mode with positive branch SILU, in plain PyTorch."""

    def forward(self, gate: Tensor) -> Tensor:
        return functional.silu(gate).relu()


class TestMeasure:
    def test_perplexity_and_zeros_are_those_of_the_plain_model(self, model: Path, tmp_path: Path) -> None:
        measured = trainer(settings(model, tmp_path)).measure()
        plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        windows = held_out_windows(counting(64, period=7), num_tokens=32, length=16)
        zeros: list[float] = []

        @torch.no_grad()
        def perplexity() -> float:
            logits = plain(windows).logits[:, :-1]
            return math.exp(functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item())

        silu = perplexity()
        for layer in plain.model.layers:
            layer.mlp.act_fn = ReluOfSilu()
            layer.mlp.act_fn.register_forward_hook(lambda _, __, out: zeros.append((out == 0).float().mean().item()))
        assert measured.perplexity["held out"]["silu"] == pytest.approx(silu, rel=1e-5)
        assert measured.perplexity["held out"]["relu"] == pytest.approx(perplexity(), rel=1e-5)
        assert measured.zeros == pytest.approx(zeros)

    def test_measures_at_the_start_now_and_then_and_at_the_end(self, model: Path, tmp_path: Path) -> None:
        assert [item.step for item in run(settings(model, tmp_path / "2")).log.measurements] == [0, 2, 4, 5]
        assert [item.step for item in run(settings(model, tmp_path / "0", eval_every=0)).log.measurements] == [0, 5]

    def test_measuring_changes_nothing_and_repeats_itself(self, model: Path, tmp_path: Path) -> None:
        often = run(settings(model, tmp_path / "often", eval_every=1))
        seldom = run(settings(model, tmp_path / "seldom", eval_every=0))
        assert without_time(often.log.steps) == without_time(seldom.log.steps)
        measured: list[Measurement] = [often.measure(), often.measure()]
        assert measured[0] == measured[1] == often.log.measurements[-1]

    @hypothesis.settings(deadline=None)
    @given(st.integers(2, 300), st.integers(1, 300), st.integers(2, 50))
    def test_windows_lie_in_the_text_and_apart(self, text_length: int, num_tokens: int, length: int) -> None:
        text = counting(text_length, period=10**6)
        windows = held_out_windows(text, num_tokens, length) - 40
        assert windows.shape[1] == min(length, text_length)
        assert windows.shape[0] == max(1, min(num_tokens, text_length) // windows.shape[1])
        flat = windows.flatten()
        assert (flat[1:] > flat[:-1]).all()
        assert flat[0] >= 0
        assert flat[-1] < text_length


class TestErrors:
    def test_a_text_shorter_than_a_sequence(self, model: Path, tmp_path: Path) -> None:
        short = Text(TextMixture([(counting(10), 1.0)], seed=0), {}, "short")
        tiny = Trainer(settings(model, tmp_path), lambda tokenizer: short, lambda line: None)
        with pytest.raises(TextError, match="has 10 tokens, fewer than one sequence of 16"):
            next(tiny.run())

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
    def test_a_device_that_is_not_there(self, model: Path, tmp_path: Path) -> None:
        with pytest.raises(InvalidTuneConfig, match="device must be 'cpu'"):
            trainer(settings(model, tmp_path, device="cuda"))

    def test_a_model_that_brings_its_own_code(self, model: Path, tmp_path: Path) -> None:
        make_tiny("llama", tmp_path / "model")
        path = tmp_path / "model" / "config.json"
        own = '"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}'
        path.write_text(path.read_text().replace('"model_type": "llama"', own))
        (tmp_path / "model" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        with pytest.raises(UnsupportedModel, match="transformers cannot load it"):
            trainer(settings(tmp_path / "model", tmp_path / "out"))
        assert not (tmp_path / "ran").exists()


def test_a_run_that_diverges_stops_before_it_spoils_the_weights(model: Path, tmp_path: Path) -> None:
    tiny = trainer(settings(model, tmp_path))
    weights = trained_weights(tiny)
    first = next(iter(tiny.loaded.trainable().values()))
    with torch.no_grad():
        first[0, 0] = math.nan

    with pytest.raises(Diverged, match="step 1 is not finite"):
        next(tiny.run())

    after = trained_weights(tiny)
    assert all(torch.equal(weight.nan_to_num(), after[name].nan_to_num()) for name, weight in list(weights.items())[1:])
    assert not (tmp_path / "state").exists()
