"""Texts from files, and the windows they are cut into."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import LLM, DType, EngineConfig
from evaluation.errors import TextError
from evaluation.texts import Text, cut_into_windows, load_text
from tests.engine.models.tiny import make_tiny

CONTEXT = 256


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = tmp_path_factory.mktemp("tiny")
    make_tiny("llama", path)
    with LLM(config=EngineConfig(model=str(path), dtype=DType.FLOAT32, kv_cache_mib=4, threads=1)) as llm:
        yield llm


class TestLoad:
    def test_a_file_is_one_document(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("one\n\ntwo\n")
        assert load_text(tmp_path / "a.txt") == Text("a.txt", ("one\n\ntwo\n",))

    def test_a_folder_has_its_text_files_in_order_of_paths(self, tmp_path: Path) -> None:
        for name, content in {"b.md": "B", "a/z.txt": "Z", "c.jsonl": '{"text": "C"}', "d.html": "D"}.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(content)

        assert load_text(tmp_path) == Text(tmp_path.name, ("Z", "B", "C"))

    def test_jsonl_has_texts_and_chats(self, tmp_path: Path) -> None:
        path = tmp_path / "x.jsonl"
        path.write_text('{"text": "one\\ntwo"}\n\n{"messages": [{"role": "user", "content": "hi"}], "id": 7}\n')
        assert load_text(path).documents == ("one\ntwo", ({"role": "user", "content": "hi"},))

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", r"x.jsonl:2: no valid JSON"),
            ("[]", r"x.jsonl:2: must be an object with either 'text' or 'messages'"),
            ('{"text": "a", "messages": []}', r"x.jsonl:2: must be an object with either"),
            ('{"text": 1}', r"x.jsonl:2: 'text' must be a string, got int"),
            ('{"messages": []}', r"x.jsonl:2: 'messages' must be a list of at least one object"),
            ('{"messages": ["hi"]}', r"x.jsonl:2: 'messages' must be a list"),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path: Path, line: str, message: str) -> None:
        (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' + line)
        with pytest.raises(TextError, match=message):
            load_text(tmp_path / "x.jsonl")

    def test_what_holds_no_text_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "empty.txt").write_text(" \n")
        with pytest.raises(TextError, match=r"empty.txt holds no text$"):
            load_text(tmp_path / "empty.txt")
        with pytest.raises(TextError, match=r"files of a folder must be \*.txt, \*.md, \*.jsonl"):
            load_text(tmp_path)

    @pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
    def test_what_cannot_be_read_is_named(self, tmp_path: Path, content: bytes | None) -> None:
        if content is not None:
            (tmp_path / "x.txt").write_bytes(content)
        with pytest.raises(TextError, match=r"cannot read .*x.txt"):
            load_text(tmp_path / "x.txt")


class TestWindows:
    TEXT = "the hat is near the tree. " * 40

    def test_windows_are_the_document_in_pieces(self, llm: LLM) -> None:
        tokens = llm.tokenizer.encode(self.TEXT)

        windows = cut_into_windows(llm, Text("x", (self.TEXT,)), context=100)

        assert [token for window in windows.windows for token in window] == tokens
        assert {len(window) for window in windows.windows[:-1]} == {100}
        assert windows.tokens == len(tokens) - len(windows.windows)

    def test_no_window_reaches_into_the_next_document(self, llm: LLM) -> None:
        windows = cut_into_windows(llm, Text("x", ("tree", "hat")), context=100)
        assert windows.windows == (tuple(llm.tokenizer.encode("tree")), tuple(llm.tokenizer.encode("hat")))

    @pytest.mark.parametrize("max_tokens", [1, 50, 99, 100, 120])
    def test_max_tokens_are_counted_exactly(self, llm: LLM, max_tokens: int) -> None:
        windows = cut_into_windows(llm, Text("x", (self.TEXT,)), context=100, max_tokens=max_tokens)

        assert windows.tokens == max_tokens
        assert list(windows.windows[0]) == llm.tokenizer.encode(self.TEXT)[: min(100, max_tokens + 1)]

    def test_a_chat_goes_through_the_template(self, llm: LLM) -> None:
        messages = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "the hat"})

        windows = cut_into_windows(llm, Text("x", (messages,)), context=100)

        assert windows.windows == (tuple(llm.tokenizer.encode_chat(messages, add_generation_prompt=False)),)

    def test_every_window_begins_with_bos_where_the_model_wants_one(self, tmp_path: Path) -> None:
        make_tiny("llama", tmp_path)
        add_bos(tmp_path)
        with LLM(config=EngineConfig(model=str(tmp_path), kv_cache_mib=4, threads=1)) as llm:
            bos, *tokens = llm.tokenizer.encode(self.TEXT)
            assert [bos, *tokens] != llm.tokenizer.encode(self.TEXT, add_special_tokens=False)

            windows = cut_into_windows(llm, Text("x", (self.TEXT,)), context=50)

        assert {window[0] for window in windows.windows} == {bos}
        assert [token for window in windows.windows for token in window[1:]] == tokens
        assert windows.tokens == len(tokens)
        assert max(map(len, windows.windows)) == 50

    @pytest.mark.parametrize("context", [1, CONTEXT + 1])
    def test_a_context_that_does_not_fit_is_refused(self, llm: LLM, context: int) -> None:
        with pytest.raises(TextError, match=rf"context must be in \[2, 256\], the model's context, got {context}"):
            cut_into_windows(llm, Text("x", (self.TEXT,)), context=context)

    def test_a_text_too_short_to_count_is_refused(self, llm: LLM) -> None:
        with pytest.raises(TextError, match="text 'x' has no document of at least 2 tokens"):
            cut_into_windows(llm, Text("x", ("a",)), context=100)


def add_bos(folder: Path) -> None:
    """Make the folder's tokenizer begin every text with BOS."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(path)
