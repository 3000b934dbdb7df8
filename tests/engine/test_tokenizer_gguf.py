from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from engine.errors import ModelLoadError
from engine.tokenizer import Tokenizer, load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def texts(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.token_text(token_id) for token_id in tokenizer.encode(text)]


BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
Entry = tuple[str, int, float]  # token, type, score


def write_gguf(path: Path, model: str, entries: list[Entry], merges: list[str] | None = None, **extra: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list([token for token, _, _ in entries])
    writer.add_token_types([kind for _, kind, _ in entries])
    if model == "llama":
        writer.add_token_scores([score for _, _, score in entries])
    if merges is not None:
        writer.add_token_merges(merges)
    for name, value in extra.items():
        key = f"tokenizer.ggml.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTE_LEVEL: list[Entry] = [
    ("<|end_of_text|>", CONTROL, 0.0),
    ("<think>", USER_DEFINED, 0.0),
    *((char, NORMAL, 0.0) for char in [*ALPHABET, "12", "123", "ĠĠ", "th", "the", "whole"]),
    ("<|eot_id|>", CONTROL, 0.0),
]
MERGES = ["1 2", "12 3", "Ġ Ġ", "t h", "th e"]


class TestGgufByteLevel:
    @pytest.mark.parametrize(
        ("pre", "pieces"),
        [
            ("smollm", ["1", "2", "3", "4"]),
            ("qwen2", ["1", "2", "3", "4"]),
            ("llama-bpe", ["123", "4"]),
            ("smaug-bpe", ["123", "4"]),
            ("gpt-2", ["123", "4"]),
            ("default", ["123", "4"]),
        ],
    )
    def test_numbers_are_split_as_the_pre_tokenizer_says(self, tmp_path: Path, pre: str, pieces: list[str]) -> None:
        path = write_gguf(tmp_path / "m.gguf", "gpt2", BYTE_LEVEL, MERGES, pre=pre, bos_token_id=0, add_bos_token=False)
        tokenizer = load_tokenizer(path)
        assert texts(tokenizer, "1234") == pieces
        assert texts(tokenizer, "the<think>") == ["the", "<think>"]

    def test_llama3_takes_groups_of_three_digits_where_gpt2_takes_all(self, tmp_path: Path) -> None:
        merges = ["1 2", "12 1"]
        entries = [*BYTE_LEVEL, ("121", NORMAL, 0.0)]
        llama3 = write_gguf(tmp_path / "a.gguf", "gpt2", entries, merges, pre="llama-bpe", add_bos_token=False)
        gpt2 = write_gguf(tmp_path / "b.gguf", "gpt2", entries, merges, pre="gpt-2")
        assert texts(load_tokenizer(llama3), "2121") == ["2", "12", "1"]  # the word is 212, not 2121
        assert texts(load_tokenizer(gpt2), "2121") == ["2", "121"]

    def test_qwen2_composes_characters(self, tmp_path: Path) -> None:
        tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", "gpt2", BYTE_LEVEL, MERGES, pre="qwen2"))
        assert tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"

    def test_a_word_that_is_a_token_needs_no_merges_in_llama3(self, tmp_path: Path) -> None:
        llama3 = write_gguf(tmp_path / "a.gguf", "gpt2", BYTE_LEVEL, MERGES, pre="llama-bpe", add_bos_token=False)
        gpt2 = write_gguf(tmp_path / "b.gguf", "gpt2", BYTE_LEVEL, MERGES, pre="gpt-2")
        assert texts(load_tokenizer(llama3), "whole") == ["whole"]
        assert texts(load_tokenizer(gpt2), "whole") == list("whole")

    @pytest.mark.parametrize(("pre", "bos"), [("llama-bpe", True), ("smaug-bpe", False), ("qwen2", False)])
    def test_bos_is_what_the_kind_wants_if_the_file_does_not_say(self, tmp_path: Path, pre: str, bos: bool) -> None:
        path = write_gguf(tmp_path / "m.gguf", "gpt2", BYTE_LEVEL, MERGES, pre=pre, bos_token_id=0)
        assert (load_tokenizer(path).encode("the")[0] == 0) is bos

    def test_bos_and_eos_as_the_file_says(self, tmp_path: Path) -> None:
        flags = {"add_bos_token": True, "add_eos_token": True, "bos_token_id": 0, "eos_token_id": len(BYTE_LEVEL) - 1}
        tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", "gpt2", BYTE_LEVEL, MERGES, pre="gpt-2", **flags))
        assert texts(tokenizer, "the") == ["<|end_of_text|>", "the", "<|eot_id|>"]
        assert tokenizer.encode("the", add_special_tokens=False) == tokenizer.encode("the")[1:-1]

    def test_end_of_turn_tokens_end_a_text_too(self, tmp_path: Path) -> None:
        path = write_gguf(
            tmp_path / "m.gguf", "gpt2", BYTE_LEVEL, MERGES, pre="llama-bpe", bos_token_id=0, eos_token_id=0
        )
        assert load_tokenizer(path).eos_token_ids == (0, len(BYTE_LEVEL) - 1)

    def test_an_unknown_pre_tokenizer_is_refused_by_name(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", "gpt2", BYTE_LEVEL, MERGES, pre="tekken")
        with pytest.raises(ModelLoadError, match=r"'tekken' is not supported; supported are .*'smollm'"):
            load_tokenizer(path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"bos_token_id": 9999}, "bos_token_id is 9999"),
            ({"eot_token_id": 9999}, "eot_token_id is 9999"),
            ({"merges": ["1 nothing"]}, "inconsistent"),
            ({"merges": None}, "merges is missing"),
            ({"model": "t5"}, "tokenizer model 't5' is not supported"),
        ],
    )
    def test_inconsistent_metadata_are_refused(self, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        arguments: dict[str, Any] = {"model": "gpt2", "merges": MERGES, "pre": "gpt-2"} | change
        with pytest.raises(ModelLoadError, match=message):
            load_tokenizer(write_gguf(tmp_path / "m.gguf", entries=BYTE_LEVEL, **arguments))


WORDS = ["▁", "a", "b", "c", "d", "▁a", "ab", "bc", "cd", "abc", "bcd", "abcd", "▁ab"]
SPECIAL: list[Entry] = [("<unk>", UNKNOWN, 0.0), ("<s>", CONTROL, 0.0), ("</s>", CONTROL, 0.0)]
BYTES: list[Entry] = [(token, BYTE, 0.0) for token in BYTE_TOKENS]


def sentencepiece(path: Path, scores: list[float] | None = None, **extra: Any) -> Tokenizer:
    scores = scores or [-float(rank) for rank in range(len(WORDS))]
    words = [(word, NORMAL, score) for word, score in zip(WORDS, scores, strict=True)]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return load_tokenizer(write_gguf(path, "llama", [*SPECIAL, *BYTES, *words], **(ids | extra)))


def join_best_neighbours(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE, slowly: join the two neighbours whose union scores highest, the leftmost of equals."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        unions = [
            (scores[left + right], -i) for i, (left, right) in enumerate(pairwise(parts)) if left + right in scores
        ]
        if not unions:
            return parts
        i = -max(unions)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


class TestGgufSentencePiece:
    @unhurried
    @given(data=st.data())
    def test_joins_by_score(self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
        ranks = data.draw(st.permutations(range(len(WORDS))))
        scores = [-float(rank) for rank in ranks]
        tokenizer = sentencepiece(tmp_path_factory.mktemp("spm") / "m.gguf", scores)
        by_word = dict(zip(WORDS, scores, strict=True))
        for text in data.draw(st.lists(st.text("abcd ", min_size=1, max_size=12), min_size=1, max_size=20)):
            pieces = [piece.replace(" ", "▁") for piece in texts(tokenizer, text)]
            assert pieces == ["<s>", *join_best_neighbours(text, by_word)]

    @unhurried
    @given(text=st.text())
    def test_any_text_survives(self, tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
        text = text.replace("▁", "")  # SentencePiece itself takes U+2581 for a space
        tokenizer = sentencepiece(tmp_path_factory.mktemp("spm") / "m.gguf")
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_characters_outside_the_vocabulary_become_bytes(self, tmp_path: Path) -> None:
        tokenizer = sentencepiece(tmp_path / "m.gguf")
        ids = tokenizer.encode("é", add_special_tokens=False)[1:]
        assert [tokenizer.token_bytes(i) for i in ids] == [b"\xc3", b"\xa9"]
        assert tokenizer.decode(ids) == "é"

    def test_byte_tokens_spelled_out_in_a_text_are_text(self, tmp_path: Path) -> None:
        tokenizer = sentencepiece(tmp_path / "m.gguf")
        assert tokenizer.decode(tokenizer.encode("<0x41>")) == "<0x41>"

    def test_the_leading_space_of_a_continuation_is_kept(self, tmp_path: Path) -> None:
        tokenizer = sentencepiece(tmp_path / "m.gguf")
        ids = tokenizer.encode("ab", add_special_tokens=False)
        assert tokenizer.decode(ids) == "ab"
        assert tokenizer.decode(ids, continuation=True) == " ab"

    def test_without_a_prefix_space(self, tmp_path: Path) -> None:
        tokenizer = sentencepiece(tmp_path / "m.gguf", add_space_prefix=False)
        assert texts(tokenizer, "ab") == ["<s>", "ab"]
        assert tokenizer.decode(tokenizer.encode(" ab")) == " ab"

    def test_bos_can_be_turned_off(self, tmp_path: Path) -> None:
        assert texts(sentencepiece(tmp_path / "m.gguf", add_bos_token=False), "ab")[0] != "<s>"

    def test_missing_scores_are_refused(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", "llama", [])
        with pytest.raises(ModelLoadError):
            load_tokenizer(path)
