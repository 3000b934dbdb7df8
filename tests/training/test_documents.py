import gzip
import json
from pathlib import Path

import pytest

from training.documents import Chat, Document, TokenIds, read_documents
from training.errors import TextError


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(path: Path) -> list[Document]:
    return list(read_documents(path))


class TestFiles:
    @pytest.mark.parametrize("name", ["a.txt", "a.md", "A.TXT", "a.txt.gz", "a.md.gz"])
    def test_plain_text_is_kept_as_it_is(self, tmp_path: Path, name: str) -> None:
        assert read(write(tmp_path / name, "# One\n\n  two é\n")) == [Document(name, "# One\n\n  two é\n")]

    @pytest.mark.parametrize("name", ["a.html", "a.htm.gz"])
    def test_html_is_stripped(self, tmp_path: Path, name: str) -> None:
        assert read(write(tmp_path / name, "<p>One</p><p>two</p>")) == [Document(name, "One\n\ntwo")]

    def test_a_byte_order_mark_is_no_text(self, tmp_path: Path) -> None:
        assert read(write(tmp_path / "a.txt", "\ufeffOne"))[0].content == "One"

    def test_a_folder_is_read_in_the_order_of_names_without_hidden_and_other_files(self, tmp_path: Path) -> None:
        for name in ("b.txt", "a/z.md", "a/.hidden.txt", ".git/c.txt", "image.png", "c.txt.gz"):
            write(tmp_path / name, name)
        assert [document.name for document in read(tmp_path)] == ["a/z.md", "b.txt", "c.txt.gz"]


class TestJsonLines:
    def test_each_line_is_a_document_and_tokens_go_before_messages_before_text(self, tmp_path: Path) -> None:
        messages = [{"role": "user", "content": "Hi"}]
        lines = [
            {"text": "one\u2028line"},
            {"messages": messages, "text": "unused"},
            {"token_ids": [1, 0, 7], "messages": messages, "more": None},
        ]
        text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        assert read(write(tmp_path / "a.jsonl", text)) == [
            Document("a.jsonl:1", "one\u2028line"),
            Document("a.jsonl:3", Chat(tuple(messages))),
            Document("a.jsonl:5", TokenIds((1, 0, 7))),
        ]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "not JSON"),
            ("[1]", "one of token_ids, messages, text"),
            ('{"content": "x"}', "one of token_ids, messages, text"),
            ('{"text": 1}', "text must be a string"),
            ('{"token_ids": []}', "token_ids must be a list of integers"),
            ('{"token_ids": [1, true]}', "token_ids must be a list of integers"),
            ('{"token_ids": [-1]}', "token_ids must be a list of integers"),
            ('{"messages": ["Hi"]}', 'messages must be a list of objects with a "role"'),
            ("[" * 100_000, "nested too deeply"),
        ],
    )
    def test_a_malformed_line_is_named(self, tmp_path: Path, line: str, message: str) -> None:
        path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line)
        with pytest.raises(TextError, match=message) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}:2: ")
        assert (caught.value.path, caught.value.line) == (path, 2)


class TestErrors:
    def test_missing_path(self, tmp_path: Path) -> None:
        with pytest.raises(TextError, match=r"nothing\.txt: no such file or folder"):
            read(tmp_path / "nothing.txt")

    def test_unknown_kind_of_file(self, tmp_path: Path) -> None:
        with pytest.raises(TextError, match=r"must end in \.htm, \.html, \.jsonl, \.md, \.txt"):
            read(write(tmp_path / "a.pdf", "x"))

    def test_folder_without_text(self, tmp_path: Path) -> None:
        with pytest.raises(TextError, match="no file in this folder ends in"):
            read(tmp_path)

    def test_bytes_that_are_not_utf8_are_named_with_their_line(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"one\ntwo\xff")
        with pytest.raises(TextError, match=r"a\.txt:2: not UTF-8 \(byte 0xff\)"):
            read(tmp_path / "a.txt")

    @pytest.mark.parametrize("data", [b"no gzip", gzip.compress(b"text" * 100)[:-20]], ids=["no gzip", "cut short"])
    def test_damaged_gzip(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "a.txt.gz").write_bytes(data)
        with pytest.raises(TextError, match="cannot read it"):
            read(tmp_path / "a.txt.gz")
