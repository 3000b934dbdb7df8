from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from engine.tokenizer import load_tokenizer
from tests.engine.models.tiny import EOS_TOKEN_ID, VOCAB_SIZE, make_tiny_tokenizer
from training.documents import Chat, Document, TokenIds
from training.errors import TextError
from training.text import (
    TextMixture,
    TextSource,
    TextTokenizer,
    TokenizedText,
    TransformersTokenizer,
    split_documents,
)

MESSAGES = ({"role": "user", "content": "the hat"}, {"role": "assistant", "content": "there"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer(path)
    return path


@pytest.fixture(scope="module", params=["engine", "transformers"])
def tokenizer(request: pytest.FixtureRequest, folder: Path) -> TextTokenizer:
    if request.param == "engine":
        return load_tokenizer(folder)
    return TransformersTokenizer(PreTrainedTokenizerFast.from_pretrained(folder))


def text(name: str, first: int, length: int) -> TokenizedText:
    """A text of the tokens `first`, `first + 1`, ...: a token says which text it is of and where."""
    return TokenizedText(name, np.arange(first, first + length, dtype=np.uint32))


def owners(batch: torch.Tensor) -> list[int]:
    return [int(row[0]) // 1000 for row in batch]


class TestTextSource:
    @pytest.mark.parametrize(
        ("argument", "path", "weight"),
        [
            ("books", "books", 1.0),
            ("books:0.5", "books", 0.5),
            ("a:b/books.txt:2", "a:b/books.txt", 2.0),
            ("a:b", "a:b", 1.0),
            ("books:1e-3", "books", 0.001),
        ],
    )
    def test_a_weight_follows_the_last_colon(self, argument: str, path: str, weight: float) -> None:
        assert TextSource.parse(argument) == TextSource(Path(path), weight)

    def test_a_file_that_exists_under_that_very_name_is_meant(self, tmp_path: Path) -> None:
        path = tmp_path / "notes:2"
        path.touch()
        assert TextSource.parse(str(path)) == TextSource(path)

    @pytest.mark.parametrize("argument", ["books:0", "books:-1", "books:nan", "books:inf"])
    def test_a_weight_is_a_finite_number_above_0(self, argument: str) -> None:
        with pytest.raises(TextError, match="books: weight must be a finite number above 0"):
            TextSource.parse(argument)

    @pytest.mark.parametrize("argument", ["", ":2"])
    def test_a_path_is_needed(self, argument: str) -> None:
        with pytest.raises(TextError, match="PATH or PATH:WEIGHT"):
            TextSource.parse(argument)


class TestTokenizedText:
    def test_documents_are_encoded_in_order_and_ended_by_eos(self, tokenizer: TextTokenizer) -> None:
        documents = [
            Document("a", "the hat"),
            Document("b", TokenIds((5, 6))),
            Document("c", Chat(MESSAGES)),
            Document("d", "there"),
        ]
        tokens = TokenizedText.from_documents("x", documents, tokenizer)
        assert tokens.token_ids.dtype == np.uint32
        assert tokens.token_ids.tolist() == [
            *tokenizer.encode("the hat"),
            EOS_TOKEN_ID,
            5,
            6,
            EOS_TOKEN_ID,
            *tokenizer.encode_chat(MESSAGES, add_generation_prompt=False),
            EOS_TOKEN_ID,
            *tokenizer.encode("there"),
            EOS_TOKEN_ID,
        ]
        assert len(tokens) == len(tokens.token_ids)

    def test_both_tokenizers_agree(self, folder: Path) -> None:
        ours, theirs = load_tokenizer(folder), TransformersTokenizer(PreTrainedTokenizerFast.from_pretrained(folder))
        assert theirs.encode("the hat is é") == ours.encode("the hat is é")
        assert theirs.encode_chat(MESSAGES) == ours.encode_chat(MESSAGES)
        assert (theirs.vocab_size, theirs.eos_token_ids) == (ours.vocab_size, ours.eos_token_ids)

    def test_more_documents_than_are_encoded_at_once(self, tokenizer: TextTokenizer) -> None:
        texts = [f"the {number}" for number in range(150)]
        tokens = TokenizedText.from_documents("x", [Document(item, item) for item in texts], tokenizer)
        assert tokens.token_ids.tolist() == [i for item in texts for i in [*tokenizer.encode(item), EOS_TOKEN_ID]]

    def test_eos_is_not_doubled_and_nothing_comes_of_nothing(self, tokenizer: TextTokenizer) -> None:
        documents = [Document("a", TokenIds((5, EOS_TOKEN_ID))), Document("b", "")]
        assert TokenizedText.from_documents("x", documents, tokenizer).token_ids.tolist() == [5, EOS_TOKEN_ID]
        assert len(TokenizedText.from_documents("x", [], tokenizer)) == 0

    def test_ids_of_another_vocabulary_are_refused(self, tokenizer: TextTokenizer) -> None:
        documents = [Document("a.jsonl:3", TokenIds((5, VOCAB_SIZE)))]
        with pytest.raises(TextError, match=r"a\.jsonl:3: token id 320 is outside the vocabulary"):
            TokenizedText.from_documents("x", documents, tokenizer)

    @pytest.mark.parametrize("kind", ["engine", "transformers"])
    def test_messages_that_the_template_rejects_are_named(self, kind: str, tmp_path: Path) -> None:
        theirs = make_tiny_tokenizer(tmp_path)
        theirs.chat_template = "{{ raise_exception('only one message, please') }}"
        theirs.save_pretrained(tmp_path)
        tokenizer = load_tokenizer(tmp_path) if kind == "engine" else TransformersTokenizer(theirs)
        with pytest.raises(TextError, match=r"a\.jsonl:3: .*template rejects the messages: only one message, please"):
            TokenizedText.from_documents("x", [Document("a.jsonl:3", Chat(MESSAGES))], tokenizer)

    def test_a_tokenizer_without_eos_is_refused(self, folder: Path) -> None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        tokenizer.eos_token = None
        with pytest.raises(TextError, match="no eos token"):
            TransformersTokenizer(tokenizer)


class TestTextMixture:
    def test_a_batch_is_a_pure_function_of_seed_and_step(self) -> None:
        texts = [(text("a", 0, 500), 1.0), (text("b", 1000, 300), 2.0)]
        mixture = TextMixture(texts, seed=3)
        earlier = [mixture.batch(step, 4, 16) for step in range(5)]
        again = TextMixture(texts, seed=3).batch(4, 4, 16)
        assert torch.equal(again, earlier[4])
        assert again.dtype == torch.int64
        assert again.shape == (4, 16)
        assert not torch.equal(earlier[3], earlier[4])
        assert not torch.equal(TextMixture(texts, seed=4).batch(4, 4, 16), again)

    def test_batches_stay_the_same_for_ever(self) -> None:
        # A run that is resumed with another version of numpy must read the same text.
        batch = TextMixture([(text("a", 0, 900), 1.0), (text("b", 1000, 900), 1.0)], seed=7).batch(11, 4, 1)
        assert batch.flatten().tolist() == [1095, 89, 513, 1377]

    def test_sequences_are_pieces_of_a_text(self) -> None:
        batch = TextMixture([(text("a", 0, 40), 1.0)], seed=0).batch(0, 64, 8)
        assert (batch[:, 1:] - batch[:, :-1] == 1).all()
        assert batch.min() >= 0
        assert batch.max() < 40

    def test_equal_weights_share_a_batch_equally(self) -> None:
        mixture = TextMixture([(text(str(i), 1000 * i, 100), 1.0) for i in range(4)], seed=1)
        for step in range(20):
            assert Counter(owners(mixture.batch(step, 8, 4))) == {0: 2, 1: 2, 2: 2, 3: 2}

    @given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 20), st.integers(0, 2**40))
    def test_every_text_gets_its_share_rounded(self, weights: list[float], size: int, step: int) -> None:
        mixture = TextMixture([(text(str(i), 1000 * i, 50), weight) for i, weight in enumerate(weights)], seed=5)
        counts = Counter(owners(mixture.batch(step, size, 4)))
        for i, weight in enumerate(weights):
            assert abs(counts[i] - size * weight / sum(weights)) < 1 + 1e-9

    def test_what_rounding_leaves_goes_round(self) -> None:
        mixture = TextMixture([(text(str(i), 1000 * i, 50), weight) for i, weight in enumerate((3, 1))], seed=2)
        counts = Counter(owner for step in range(2000) for owner in owners(mixture.batch(step, 1, 4)))
        assert counts[1] == pytest.approx(500, abs=4 * (2000 * 0.25 * 0.75) ** 0.5)

    def test_the_place_in_a_batch_does_not_tell_the_text(self) -> None:
        mixture = TextMixture([(text(str(i), 1000 * i, 50), 1.0) for i in range(2)], seed=2)
        assert {tuple(owners(mixture.batch(step, 2, 4))) for step in range(40)} == {(0, 1), (1, 0)}

    def test_every_offset_is_drawn_the_last_one_too(self) -> None:
        mixture = TextMixture([(text("a", 0, 12), 1.0)], seed=0)
        starts = Counter(int(row[0]) for step in range(20) for row in mixture.batch(step, 50, 8))
        assert set(starts) == {0, 1, 2, 3, 4}
        assert min(starts.values()) > 200 - 4 * (1000 * 0.2 * 0.8) ** 0.5

    def test_num_tokens(self) -> None:
        assert TextMixture([(text("a", 0, 40), 1.0), (text("b", 0, 2), 1.0)], seed=0).num_tokens == 42

    def test_a_text_shorter_than_a_sequence_is_named(self) -> None:
        mixture = TextMixture([(text("a", 0, 40), 1.0), (text("short.txt", 0, 7), 1.0)], seed=0)
        assert mixture.batch(0, 2, 7).shape == (2, 7)
        with pytest.raises(TextError, match=r"short\.txt has 7 tokens, fewer than one sequence of 8"):
            mixture.batch(0, 2, 8)

    @pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
    def test_a_weight_is_a_finite_number_above_0(self, weight: float) -> None:
        with pytest.raises(TextError, match="a: weight must be"):
            TextMixture([(text("a", 0, 40), weight)], seed=0)

    def test_no_text_and_a_negative_seed_are_refused(self) -> None:
        with pytest.raises(TextError, match="no text to train on"):
            TextMixture([], seed=0)
        with pytest.raises(TextError, match="seed must be at least 0"):
            TextMixture([(text("a", 0, 40), 1.0)], seed=-1)

    def test_from_sources(self, tmp_path: Path, tokenizer: TextTokenizer) -> None:
        (tmp_path / "a.txt").write_text("x" * 100)
        (tmp_path / "b.txt").write_text("y" * 100)
        sources = [TextSource(tmp_path / "a.txt", 1.0), TextSource(tmp_path / "b.txt", 3.0)]
        mixture = TextMixture.from_sources(sources, tokenizer, seed=0)
        (x,), (y,) = tokenizer.encode("x"), tokenizer.encode("y")
        assert mixture.num_tokens == 202
        assert Counter(mixture.batch(0, 8, 1).flatten().tolist()) == {x: 2, y: 6}


class TestSplitDocuments:
    documents = tuple(Document(name, name) for name in ("a/one.txt", "a/two.txt", "b/one.txt"))

    @pytest.mark.parametrize(
        ("patterns", "held"),
        [((), []), (("a/*",), ["a/one.txt", "a/two.txt"]), (("*two*", "b/one.txt"), ["a/two.txt", "b/one.txt"])],
    )
    def test_documents_are_held_out_by_name(self, patterns: Sequence[str], held: list[str]) -> None:
        train, held_out = split_documents(self.documents, patterns)
        assert [document.name for document in held_out] == held
        assert sorted([*train, *held_out], key=lambda document: document.name) == list(self.documents)

    def test_a_pattern_that_holds_out_nothing_is_an_error(self) -> None:
        with pytest.raises(TextError, match=r"matches the held-out pattern 'tow\*'"):
            split_documents(self.documents, ["a/*", "tow*"])
