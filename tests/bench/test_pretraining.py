"""The small-scale pre-training comparison, with models that learn nothing in a few steps."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft", reason="training needs the extra 'train'")
pytest.importorskip("matplotlib", reason="plots need the extra 'eval'")

from bench.pretraining import RECIPES, Settings, main, read_kinds, run_config, thin, train_tokenizer
from engine import PositiveBranch
from training.errors import TextError

SMALL = {
    "--steps": 6,
    "--batch-size": 2,
    "--sequence-length": 16,
    "--alpha": 0.34,
    "--learning-rate": 1e-2,
    "--vocabulary": 300,
    "--hidden-size": 32,
    "--intermediate-size": 64,
    "--layers": 2,
    "--dtype": "float32",
}
SWITCH = 4  # of six steps, two run in RELU


def write_corpus(folder: Path) -> Path:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(60)]
    for kind in ("letters", "recipes"):
        for split, length in (("train", 600), ("held_out", 80)):
            path = folder / kind / split / "text.txt"
            path.parent.mkdir(parents=True)
            path.write_text(" ".join(rng.choices(words, k=length)))
    return folder


class Bench:
    """The benchmark as run from the command line."""

    def __init__(self, folder: Path) -> None:
        self.work, self.image, self.out = folder / "work", folder / "images" / "picture.svg", folder / "results"
        self.corpus = write_corpus(folder / "corpus")

    def run(self, *arguments: str) -> dict[str, Any]:
        paths = {"--corpus": self.corpus, "--work": self.work, "--image": self.image, "--out": self.out}
        main([*(str(text) for option in (SMALL | paths).items() for text in option), *arguments])
        (path,) = self.out.glob("pretraining-*.json")
        document: dict[str, Any] = json.loads(path.read_text())
        return document


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("pretraining"))


@pytest.fixture(scope="module")
def result(bench: Bench) -> dict[str, Any]:
    return bench.run("--seeds", "0", "1")


def losses(result: dict[str, Any], recipe: str, seed: int = 0) -> list[float]:
    (run,) = (run for run in result["results"][recipe]["runs"] if run["seed"] == seed)
    return [loss for _, loss in run["curve"]]


def test_result_has_every_recipe_and_seed(result: dict[str, Any]) -> None:
    assert list(result["results"]) == ["silu", "relu", "stocha", "swi_ft"]
    for recipe in result["results"].values():
        assert [run["seed"] for run in recipe["runs"]] == [0, 1]
        for run in recipe["runs"]:
            assert run["tokens"] == 6 * 2 * 16
            assert run["curve"][-1][0] == run["tokens"]
            assert len(run["zeros"]) == 2
            assert run["final_loss"] == run["held_out_loss"][recipe["activation"]]
    assert {name: recipe["activation"] for name, recipe in result["results"].items()} == {
        "silu": "silu",
        "relu": "relu",
        "stocha": "relu",
        "swi_ft": "relu",
    }


def test_recipes_differ_in_their_activation_alone(result: dict[str, Any]) -> None:
    # Two batches of the same seed are the same, and so are two models: the curves part where the activations do.
    assert losses(result, "swi_ft")[:SWITCH] == losses(result, "silu")[:SWITCH]
    assert losses(result, "swi_ft")[SWITCH] != losses(result, "silu")[SWITCH]
    firsts = {recipe: losses(result, recipe)[0] for recipe in RECIPES}
    assert max(firsts.values()) - min(firsts.values()) < 0.1
    assert losses(result, "silu", seed=0) != losses(result, "silu", seed=1)


def test_difference_to_silu_is_taken_seed_by_seed(result: dict[str, Any]) -> None:
    silu, relu = ([run["final_loss"] for run in result["results"][name]["runs"]] for name in ("silu", "relu"))
    assert result["results"]["relu"]["final_loss_minus_silu"]["max"] == pytest.approx(
        max(a - b for a, b in zip(relu, silu, strict=True)), abs=1e-4
    )


def test_picture_names_every_recipe(bench: Bench, result: dict[str, Any]) -> None:
    picture = bench.image.read_text()
    assert all(recipe.label in picture for recipe in RECIPES.values())


def test_finished_runs_are_not_done_again(bench: Bench, result: dict[str, Any]) -> None:
    again = bench.run("--seeds", "0", "1", "2")
    for name, recipe in result["results"].items():
        # Seconds are measured anew where a run is done anew.
        assert again["results"][name]["runs"][:2] == recipe["runs"]
        assert len(again["results"][name]["runs"]) == 3


@pytest.mark.parametrize("changed", [["--learning-rate", "2e-2"], ["--intermediate-size", "96"]])
def test_finished_runs_of_other_settings_are_refused(
    bench: Bench, result: dict[str, Any], changed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.run("--seeds", "0", *changed)
    assert "other settings" in capsys.readouterr().err


def test_relu_is_max_of_x_and_0_from_the_first_step() -> None:
    config = run_config(RECIPES["relu"], Settings(), 0, Path("model"), Path("run"))
    assert config.positive_branch is PositiveBranch.IDENTITY
    assert config.p.draw(0.0, 3, np.random.default_rng(0)).tolist() == [0, 0, 0]


def test_curve_is_thinned_without_mixing_steps_before_and_after_the_switch() -> None:
    losses = [1.0] * 480 + [5.0] * 120
    points = list(thin(losses, 480))
    assert [value for _, value in points] == [1.0] * 50 + [5.0] * 50
    assert [step for step, _ in points] == sorted(step for step, _ in points)
    assert list(thin([3.0, 2.0], 2)) == [(1.0, 3.0), (2.0, 2.0)]


def test_kinds_with_token_ids_are_left_out(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    for split in ("train", "held_out"):
        (corpus / "chat" / split).mkdir(parents=True)
        (corpus / "chat" / split / "chat.jsonl").write_text('{"token_ids": [1, 2, 49000]}\n')
    assert [kind.name for kind in read_kinds(corpus)] == ["letters", "recipes"]


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="KIND/train"):
        read_kinds(tmp_path)


def test_tokenizer_has_the_vocabulary_asked_for_and_reads_any_text(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(read_kinds(write_corpus(tmp_path)), 300)
    assert len(tokenizer) == 300
    text = "abc Ünïcode 😀\n\tx"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
