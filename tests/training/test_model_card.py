"""The model card says what the recipe's files say."""

import json
from pathlib import Path

import pytest

from training.log import RUN_FILE, STEPS_FILE
from training.model_card import write_card

STEPS = """step,tokens,loss,next_token,distillation,zeros,gradient_norm,learning_rate,seconds
1,1000000,1,1,1,0.5,1,0.001,90
2,2000000,1,1,1,0.5,1,0.001,{seconds}
"""


def result(activation: str, perplexity: float) -> dict[str, object]:
    return {"text": "chat", "activation": activation, "mode": activation, "perplexity": perplexity}


@pytest.fixture
def build(tmp_path: Path) -> Path:
    folder = tmp_path / "build"
    kind = {"train_characters": 1234567, "held_out_characters": 1000, "removed": 3}
    source = {"title": "Tales", "package": "tales", "version": "1.0", "kind": "narrative", "licence": "MIT"}
    files: dict[str, object] = {
        "corpus/corpus.json": {"sources": [source], "kinds": {"chat": kind}},
        "untouched.json": {"results": [result("silu", 16.0)]},
        "perplexity.json": {
            "results": [result("silu", 16.2), result("relu", 19.44)],
            "machine": {"cores": 2, "cpu": "Abacus"},
        },
        "sparsity.json": {"results": [{"zeros": [0.6, 0.9]}, {"zeros": [0.8, 0.9]}]},
        f"run/{RUN_FILE}": {"device": "cpu", "settings": {"sequence_length": 128}},
    }
    for name, document in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document))
    (folder / "run" / STEPS_FILE).write_text(STEPS.format(seconds=90))
    return folder


def test_quality_data_and_training(build: Path, tmp_path: Path) -> None:
    card = write_card(build, tmp_path).read_text()

    assert "| chat | 16.00 | 16.20 (1.012) | 19.44 (1.200) |" in card
    assert "Zeros in RELU mode: 80.0% on average, from 70% to 90% by layer." in card
    assert "| Tales (Debian package tales 1.0) | narrative | MIT |" in card
    assert "| chat | 1,234,567 | 1,000 |" in card
    assert "2 steps, 2.0 million tokens, 3 minutes on 2 cores of Abacus." in card
    assert "sequences of training have 128." in card


def test_a_gpu_is_named_and_hours_are_hours(build: Path, tmp_path: Path) -> None:
    (build / "run" / RUN_FILE).write_text(json.dumps({"device": "NVIDIA Y", "settings": {"sequence_length": 512}}))
    (build / "run" / STEPS_FILE).write_text(STEPS.format(seconds=5310))

    assert "1.5 hours on one NVIDIA Y." in write_card(build, tmp_path).read_text()
