import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.engine.models.tiny import make_tiny, make_tiny_tokenizer
from tests.training.tiny_run import settings, trainer
from training.errors import TextError
from training.export import ADAPTER_WEIGHTS
from training.log import MEASUREMENTS_FILE, PLOT_FILE, RUN_FILE, STEPS_FILE
from training.text import TextSource
from training.trainer import Text
from training.tune import finish, names_of, text_reader


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for name in ("manual", "tale"):
        (tmp_path / f"{name}.txt").write_text(f"the text of the {name} " * 20)
    return tmp_path


class TestTextReader:
    def read(self, tokenizer: Any, folder: Path, *sources: str, held_out: str | None = None, seed: int = 0) -> Text:
        measured = {} if held_out is None else {"held out": folder / held_out}
        return text_reader([TextSource.parse(str(folder / source)) for source in sources], measured, seed)(tokenizer)

    def test_reads_what_to_train_on_and_what_to_measure_on(self, tokenizer: Any, texts: Path) -> None:
        text = self.read(tokenizer, texts, "manual.txt", held_out="tale.txt")
        assert text.mixture.batch(0, 2, 16).shape == (2, 16)
        assert tokenizer.decode(text.held_out["held out"].token_ids).startswith("the text of the tale the text")

    def test_the_fingerprint_follows_the_batches(self, tokenizer: Any, texts: Path) -> None:
        first = self.read(tokenizer, texts, "manual.txt", "tale.txt").fingerprint
        assert self.read(tokenizer, texts, "manual.txt", "tale.txt", held_out="tale.txt").fingerprint == first
        others = [
            self.read(tokenizer, texts, "manual.txt", "tale.txt:2").fingerprint,
            self.read(tokenizer, texts, "tale.txt", "manual.txt").fingerprint,
            self.read(tokenizer, texts, "manual.txt").fingerprint,
        ]
        (texts / "tale.txt").write_text("another tale " * 20)
        others.append(self.read(tokenizer, texts, "manual.txt", "tale.txt").fingerprint)
        assert len({first, *others}) == 5

    def test_another_seed_gives_other_batches(self, tokenizer: Any, texts: Path) -> None:
        one, other = (self.read(tokenizer, texts, "manual.txt", seed=seed).mixture.batch(0, 4, 16) for seed in (0, 1))
        assert not one.equal(other)

    def test_refuses_a_held_out_text_with_nothing_to_predict(self, tokenizer: Any, texts: Path) -> None:
        (texts / "empty.txt").write_text("")
        with pytest.raises(TextError, match="empty"):
            self.read(tokenizer, texts, "manual.txt", held_out="empty.txt")


class TestNames:
    def test_a_text_is_called_as_its_file_or_folder(self) -> None:
        paths = [Path("a/manual.txt"), Path("b/tales"), Path("corpus/chat/held_out")]
        assert list(names_of(paths)) == ["manual", "tales", "chat"]
        assert list(names_of(paths).values()) == paths

    def test_two_of_one_name_are_refused(self) -> None:
        with pytest.raises(TextError, match=r"two held-out texts are called 'manual': a/manual\.txt and b/manual\.md"):
            names_of([Path("a/manual.txt"), Path("b/manual.md")])


def test_finish_writes_the_result_beside_log_and_picture(tmp_path: Path) -> None:
    make_tiny("llama", tmp_path / "model")
    run = trainer(settings(tmp_path / "model", tmp_path / "out", steps=1))
    for _ in run.run():
        pass
    assert finish(run) == tmp_path / "out" / ADAPTER_WEIGHTS
    names = {path.name for path in (tmp_path / "out").iterdir()}
    written = {"adapter_config.json", ADAPTER_WEIGHTS, STEPS_FILE, MEASUREMENTS_FILE, PLOT_FILE, RUN_FILE, "state"}
    assert names == written
    described = json.loads((tmp_path / "out" / RUN_FILE).read_text())
    assert described["device"] == "cpu"
    assert described["settings"]["steps"] == 1
