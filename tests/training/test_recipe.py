"""The recipe of the shipped adapter: what is measured must not be trained on."""

import re
import shlex
from pathlib import Path

import pytest

from engine.models.checkpoint import DEFAULT_ADAPTER
from training.corpus import CHAT, HELD_OUT, MAX_OVERLAP, CorpusKind, build_corpus, check_overlap
from training.documents import Document
from training.errors import CorpusError
from training.schedule import Mixture, parse_p

FOLDER = Path(__file__).parents[2] / "models" / DEFAULT_ADAPTER
RECIPE = (FOLDER / "recipe.sh").read_text()


def option(name: str) -> str:
    (value,) = re.findall(rf"--{name} (\S+)", RECIPE)
    return str(value)


def test_training_reads_the_training_half_of_each_kind_and_measures_on_the_other() -> None:
    (kinds,) = re.findall(r"^kinds=\((.*)\)$", RECIPE, re.MULTILINE)

    assert set(shlex.split(kinds)) == {*HELD_OUT, CHAT}
    assert re.findall(r"--text (\S+)", RECIPE) == ['"$corpus/$kind/train")']
    assert re.findall(r"--held-out (\S+)", RECIPE) == ['"$corpus/$kind/held_out")']
    assert re.findall(r"measured\+=\((\S+)\)", RECIPE) == ['"$corpus/$kind/held_out"']


def test_a_corpus_that_leaks_is_never_written() -> None:
    words = [f"word{number}" for number in range(400)]
    held_out = " ".join(words[:200])
    leak = f"{' '.join(words[200:])}\n\nAs is written elsewhere: {held_out}"
    documents = {"essay": [Document("secH31", held_out), Document("secA1", leak)]}

    kinds = build_corpus(documents, {"essay": ("secH3*",)})

    assert kinds["essay"].overlap_before > 0.9
    assert kinds["essay"].overlap == 0
    assert [document.name for document in kinds["essay"].train] == ["secA1"]
    check_overlap(kinds)


def test_the_check_refuses_what_removal_has_missed() -> None:
    leaking = CorpusKind(train=(), held_out=(), overlap_before=0.5, overlap=2 * MAX_OVERLAP, removed=3)

    with pytest.raises(CorpusError, match="occur in training text"):
        check_overlap({"essay": leaking})


def test_all_three_modes_are_trained() -> None:
    p = parse_p(option("p"))

    assert isinstance(p, Mixture)
    assert p.relu > 0
    assert p.silu > 0
    assert p.uniform > 0
    assert option("distillation") == "1"
