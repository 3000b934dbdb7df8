"""The recipe of the corpus: what is held out, and that none of it is trained on."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from tests.training.packages import corpus_files, prose, write_deb
from training.conversations import Conversation, append_batch, read_conversations
from training.corpus import CHAT, HELD_OUT, build_corpus, check_overlap, main, split_chats, write_corpus
from training.corpus_sources import SOURCES
from training.documents import Document, read_documents
from training.errors import CorpusError, TextError
from training.overlap import overlap

app = typer.Typer()
app.command()(main)


def names(documents: tuple[Document, ...]) -> list[str]:
    return [document.name for document in documents]


def chat(number: int, answer: str | None = None) -> Conversation:
    answer = answer or prose(f"answer{number}x", 3)
    return Conversation(f"Question {number}?", answer, (1, number), f"<s>Question {number}?{answer}", True)


class TestBuildCorpus:
    def test_named_documents_are_held_out(self) -> None:
        documents = [Document(name, prose(name)) for name in ("a1", "a2", "b1")]
        kinds = build_corpus({"x": documents}, {"x": ["a*"]})
        assert names(kinds["x"].held_out) == ["a1", "a2"]
        assert names(kinds["x"].train) == ["b1"]
        assert (kinds["x"].overlap_before, kinds["x"].overlap, kinds["x"].removed) == (0.0, 0.0, 0)

    def test_quotations_of_held_out_text_are_removed_from_every_kind(self) -> None:
        quotation = prose("held", 4)
        documents = {
            "x": [Document("held", prose("held")), Document("own", f"{prose('own')}\n\nAs he says: {quotation}")],
            "y": [Document("other", prose("other")), Document("quoting", f"{quotation}\n\n{prose('quoting')}")],
            "z": [Document("third", prose("third")), Document("fourth", quotation)],
        }
        kinds = build_corpus(documents, {"x": ["held"], "y": ["other"], "z": ["third"]})
        train = [str(document.content) for kind in kinds.values() for document in kind.train]
        assert train == [prose("own"), prose("quoting")]
        assert kinds["x"].overlap_before > 0.05
        assert [kinds[kind].removed for kind in "xyz"] == [1, 1, 1]
        assert overlap(train, [prose("held")]) == kinds["x"].overlap == 0.0
        check_overlap(kinds)

    def test_a_conversation_is_removed_as_a_whole(self) -> None:
        answers = [prose("quoted", 6), "Short.\n\n" + prose("quoted", 6), *(prose(f"own{i}x", 6) for i in range(8))]
        chats = [chat(number, answer) for number, answer in enumerate([*answers, prose("quoted", 9)])]
        documents, held = split_chats(chats)
        kinds = build_corpus({CHAT: documents}, {CHAT: held})
        assert names(kinds[CHAT].held_out) == ["000010"]
        assert names(kinds[CHAT].train) == [f"{number:06d}" for number in range(2, 10)]
        assert kinds[CHAT].removed == 2

    def test_a_pattern_that_holds_out_nothing_is_an_error(self) -> None:
        with pytest.raises(TextError, match="matches the held-out pattern 'b'"):
            build_corpus({"x": [Document("a", prose("a"))]}, {"x": ["b"]})

    def test_a_corpus_with_a_leak_is_refused(self) -> None:
        documents = [Document("a", prose("a")), Document("b", f"{prose('b')}\n\n{prose('a', 10)}")]
        kinds = build_corpus({"x": documents}, {"x": ["a"]}, whole=())
        leaking = {"x": _replace_overlap(kinds["x"], overlap([prose("a", 10)], [prose("a")]))}
        with pytest.raises(CorpusError, match=r"\d+\.\d\d% of the runs of 13 words in the held-out x text"):
            check_overlap(leaking)


def _replace_overlap(kind: Any, value: float) -> Any:
    from dataclasses import replace

    return replace(kind, overlap=value)


class TestSplitChats:
    @pytest.mark.parametrize(("count", "held"), [(1, 1), (5, 1), (20, 2), (104, 10)])
    def test_the_last_tenth_is_held_out(self, count: int, held: int) -> None:
        documents, patterns = split_chats([chat(number) for number in range(count)])
        assert len(documents) == count
        assert list(patterns) == names(tuple(documents[count - held :]))


class TestWriteCorpus:
    def test_documents_that_would_overwrite_each_other_are_refused(self, tmp_path: Path) -> None:
        documents = [Document(name, prose(name)) for name in ("a.txt", "a.html", "b.html")]
        kinds = build_corpus({"x": documents}, {"x": ["b.html"]})
        with pytest.raises(CorpusError, match=r"two documents of the kind x would be written to a\.txt"):
            write_corpus(tmp_path, kinds, [])

    def test_files_of_an_earlier_corpus_do_not_stay(self, tmp_path: Path) -> None:
        documents = [Document(name, prose(name)) for name in ("one", "two")]
        write_corpus(tmp_path, build_corpus({"x": documents}, {"x": ["one"]}), [])
        write_corpus(tmp_path, build_corpus({"x": documents}, {"x": ["two"]}), [])
        files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.txt"))
        assert files == ["x/held_out/two.txt", "x/train/one.txt"]


class TestCommand:
    @pytest.fixture
    def packages(self, tmp_path: Path) -> Path:
        scratch, folder = tmp_path / "scratch", tmp_path / "packages"
        scratch.mkdir()
        for name, files in corpus_files(scratch).items():
            write_deb(folder / f"{name}_1.0_all.deb", files)
        return folder

    def run(self, *arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    def test_the_whole_recipe(self, tmp_path: Path, packages: Path) -> None:
        chats, output = tmp_path / "chats.jsonl", tmp_path / "corpus"
        append_batch(chats, 0, 0, [chat(number) for number in range(20)])
        result = self.run("--output", output, "--packages", packages, "--chats", chats)
        assert result.exit_code == 0, result.output

        held_out = sorted(path.relative_to(output).as_posix() for path in output.glob("*/held_out/*"))
        assert held_out == [
            "chat/held_out/chat.jsonl",
            "essay/held_out/secH3.txt",
            "narrative/held_out/persuasion.txt",
            "technical/held_out/apt.txt",
            "technical/held_out/network-services.txt",
            "technical/held_out/sect.apt-get.txt",
        ]
        assert len(list(read_conversations(output / "chat/train/chat.jsonl"))) == 18
        assert (output / "quiz" / "europe").read_text() == "France:Paris\n"

        for kind in HELD_OUT:
            train = [
                str(document.content) for other in HELD_OUT for document in read_documents(output / other / "train")
            ]
            held = [str(document.content) for document in read_documents(output / kind / "held_out")]
            assert overlap(train, held) == 0.0

        summary = json.loads((output / "corpus.json").read_text())
        assert summary["kinds"]["essay"]["overlap_before"] > 0
        assert summary["kinds"]["essay"]["overlap"] == 0
        assert summary["kinds"]["essay"]["removed"] == 1
        assert [source["package"] for source in summary["sources"]] == [source.package for source in SOURCES]
        assert all(source["licence"] and source["version"] == "1.0" for source in summary["sources"])

    def test_the_extended_corpus_has_more_technical_text(self, tmp_path: Path, packages: Path) -> None:
        assert self.run("--output", tmp_path / "corpus", "--packages", packages, "--extended").exit_code == 0
        names = {path.name for path in (tmp_path / "corpus" / "technical" / "train").iterdir()}
        assert {"apache-mod-core.txt", "constitution.txt"} <= names
        summary = json.loads((tmp_path / "corpus" / "corpus.json").read_text())
        assert {source["package"] for source in summary["sources"]} == set(corpus_files(tmp_path)) - {"bsdgames"}

    def test_a_damaged_package_is_an_error_in_words(self, tmp_path: Path, packages: Path) -> None:
        (packages / "anarchism_1.0_all.deb").write_bytes(b"damaged")
        result = self.run("--output", tmp_path / "corpus", "--packages", packages)
        assert result.exit_code == 1
        assert "error: " in result.output
        assert "anarchism_1.0_all.deb is no Debian package" in result.output
        assert not list((tmp_path / "corpus").glob("*/train"))
