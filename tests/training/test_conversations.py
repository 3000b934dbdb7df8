from pathlib import Path

import pytest

from training.conversations import Conversation, append_batch, read_conversations, resume
from training.documents import TokenIds, read_documents
from training.errors import GenerationError


def conversation(number: int) -> Conversation:
    return Conversation(f"Why {number}?", "Because\u2028é.", (1, number, 2), f"<s>Why {number}?", finished=number > 1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two batches, of two conversations and of one."""
    file = tmp_path / "chats.jsonl"
    append_batch(file, 5, 0, [conversation(0), conversation(1)])
    append_batch(file, 5, 2, [conversation(2)])
    return file


def test_conversations_come_back_as_they_were(path: Path) -> None:
    assert list(read_conversations(path)) == [conversation(0), conversation(1), conversation(2)]


def test_training_reads_the_tokens(path: Path) -> None:
    assert [document.content for document in read_documents(path)] == [TokenIds((1, i, 2)) for i in range(3)]


def test_what_was_spoken_is_without_the_template() -> None:
    assert conversation(3).spoken == "Why 3?\n\nBecause\u2028é."


class TestResume:
    def test_a_whole_file_goes_on_after_its_last_batch(self, path: Path) -> None:
        before = path.read_bytes()
        progress = resume(path, 5)
        assert (progress.next_batch, progress.num_conversations, progress.num_tokens) == (3, 3, 9)
        assert progress.users == {"Why 0?", "Why 1?", "Why 2?"}
        assert path.read_bytes() == before

    def test_a_file_cut_anywhere_keeps_its_whole_batches(self, path: Path) -> None:
        whole = path.read_bytes()
        ends = [0, whole.index(b'{"seed"', whole.index(b"Why 1?")), len(whole)]
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            progress = resume(path, 5)
            kept = max(end for end in ends if end <= length)
            assert path.read_bytes() == whole[:kept]
            assert progress.next_batch == (0, 1, 3)[ends.index(kept)]

    def test_no_file_is_a_beginning(self, tmp_path: Path) -> None:
        assert resume(tmp_path / "none.jsonl", 5).next_batch == 0

    def test_another_seed_is_refused_and_nothing_is_lost(self, path: Path) -> None:
        before = path.read_bytes()
        with pytest.raises(GenerationError, match="written with seed 5, not 6"):
            resume(path, 6)
        assert path.read_bytes() == before

    @pytest.mark.parametrize("line", ["{}", "no JSON", '{"user": "x"}', "[]"])
    def test_a_file_of_something_else_is_refused_and_nothing_is_lost(self, path: Path, line: str) -> None:
        content = path.read_text() + line + "\n"
        path.write_text(content)
        with pytest.raises(GenerationError, match=r"chats\.jsonl:4: "):
            resume(path, 5)
        with pytest.raises(GenerationError, match=r"chats\.jsonl:4: "):
            list(read_conversations(path))
        assert path.read_text() == content


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match=r"none\.jsonl: cannot read it"):
        list(read_conversations(tmp_path / "none.jsonl"))
