"""Self-generation with a tiny model of random weights, whose text is noise but whose turns are real."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from engine import LLM, DType, EngineConfig, InvalidRequest
from tests.engine.models.tiny import (
    CHAT_TEMPLATE,
    EOS_TOKEN_ID,
    IM_END_TOKEN_ID,
    IM_START_TOKEN_ID,
    make_tiny,
    make_tiny_tokenizer,
)
from training.conversations import read_conversations
from training.errors import GenerationError
from training.self_generation import (
    ChatFrame,
    GenerationSettings,
    chat_batches,
    generate_chats,
    generate_documents,
    write_texts,
)

SETTINGS = GenerationSettings(batch_size=24, top_p=1.0, max_user_tokens=60, min_user_tokens=2, max_answer_tokens=12)
CONFIG = EngineConfig(dtype=DType.FLOAT32, kv_cache_mib=8, threads=1, max_num_seqs=32, max_num_batched_tokens=128)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("model")
    make_tiny("llama", folder)
    with LLM(str(folder), config=CONFIG) as model:
        yield model


def with_template(folder: Path, template: str | None) -> LLM:
    make_tiny("llama", folder)
    tokenizer = make_tiny_tokenizer(folder)
    tokenizer.chat_template = template
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return LLM(str(folder), config=CONFIG)


class TestChatFrame:
    def test_a_frame_and_a_message_are_the_chat(self, llm: LLM) -> None:
        frame = ChatFrame.of(llm.tokenizer)
        chat = llm.tokenizer.encode_chat([{"role": "user", "content": "the hat"}])
        assert [*frame.before, *llm.tokenizer.encode("the hat"), *frame.after] == chat
        assert frame.before[0] == IM_START_TOKEN_ID
        assert frame.after[0] == IM_END_TOKEN_ID

    def test_a_system_prompt_of_the_template_stands_before_the_message(self, tmp_path: Path) -> None:
        with with_template(tmp_path, "<|im_start|>system\nBe kind.<|im_end|>\n" + CHAT_TEMPLATE) as llm:
            before = llm.tokenizer.decode(ChatFrame.of(llm.tokenizer).before)
        assert before == "system\nBe kind.\nuser\n"

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            (None, "no chat template"),
            ("{{ messages[0]['content'] | lower }}!", "cannot find the user's message"),
            ("{{ messages[0]['content'] }}, {{ messages[0]['content'] }}!", "cannot find the user's message"),
            ("{{ messages[0]['content'] }}", "cannot find the user's message"),
        ],
    )
    def test_templates_without_a_place_for_a_message(self, tmp_path: Path, template: str | None, message: str) -> None:
        with with_template(tmp_path, template) as llm, pytest.raises(GenerationError, match=message):
            next(generate_chats(llm, 1, 0, SETTINGS))


class TestChats:
    def test_a_conversation_is_template_message_and_answer(self, llm: LLM) -> None:
        frame = ChatFrame.of(llm.tokenizer)
        for chat in generate_chats(llm, 8, 0, SETTINGS):
            ids = list(chat.token_ids)
            end = ids.index(IM_END_TOKEN_ID, len(frame.before))
            message, rest = ids[len(frame.before) : end], ids[end:]
            answer = rest[len(frame.after) :]
            assert tuple(ids[: len(frame.before)]) == frame.before
            assert tuple(rest[: len(frame.after)]) == frame.after
            assert SETTINGS.min_user_tokens <= len(message) < SETTINGS.max_user_tokens
            assert llm.tokenizer.decode(message).strip() == chat.user
            assert IM_START_TOKEN_ID not in message
            assert EOS_TOKEN_ID not in message
            assert 1 <= len(answer) <= SETTINGS.max_answer_tokens
            assert chat.finished == (answer[-1] == EOS_TOKEN_ID)
            assert chat.text == llm.tokenizer.decode(ids, skip_special_tokens=False)
            assert chat.answer.strip()

    def test_the_same_seed_writes_the_same_and_another_seed_something_else(self, llm: LLM) -> None:
        first = list(generate_chats(llm, 5, 3, SETTINGS))
        assert list(generate_chats(llm, 5, 3, SETTINGS)) == first
        assert not {chat.user for chat in generate_chats(llm, 5, 4, SETTINGS)} & {chat.user for chat in first}

    def test_a_batch_depends_on_its_number_and_not_on_where_the_run_began(self, llm: LLM) -> None:
        from_start = list(islice(chat_batches(llm, 7, SETTINGS), 3))
        assert [number for number, _ in from_start] == [0, 1, 2]
        known = {chat.user for _, chats in from_start[:2] for chat in chats}
        assert next(chat_batches(llm, 7, SETTINGS, first=2, known=known)) == from_start[2]

    def test_a_known_message_is_not_answered_again(self, llm: LLM) -> None:
        _, chats = next(chat_batches(llm, 7, SETTINGS))
        _, others = next(chat_batches(llm, 7, SETTINGS, known={chats[0].user}))
        assert [chat.user for chat in others] == [chat.user for chat in chats[1:]]

    def test_greedy_messages_are_all_alike_so_one_is_kept_and_then_it_gives_up(self, llm: LLM) -> None:
        settings = GenerationSettings(batch_size=4, temperature=0.0, max_user_tokens=100, min_user_tokens=1)
        with pytest.raises(GenerationError, match="nothing of use in 5 batches"):
            list(generate_chats(llm, 2, 0, settings))

    @pytest.mark.parametrize("size", [0, 129])
    def test_batch_size_is_checked(self, size: int) -> None:
        with pytest.raises(GenerationError, match=r"batch_size must be in \[1, 128\]"):
            GenerationSettings(batch_size=size)

    def test_settings_that_do_not_fit_the_model_are_refused(self, llm: LLM) -> None:
        with pytest.raises(InvalidRequest):
            next(generate_chats(llm, 1, 0, GenerationSettings(max_user_tokens=1000)))

    def test_a_negative_seed_is_refused(self, llm: LLM) -> None:
        with pytest.raises(GenerationError, match="seed must be at least 0"):
            next(generate_chats(llm, 1, -1, SETTINGS))


class TestDocuments:
    def test_they_begin_after_the_separator_and_need_no_template(self, tmp_path: Path) -> None:
        with with_template(tmp_path, None) as llm:
            documents = list(generate_documents(llm, 30, 0, SETTINGS))
            assert len({document.answer for document in documents}) > 25
            for document in documents:
                assert document.user == ""
                assert document.token_ids[0] == EOS_TOKEN_ID
                assert document.answer == llm.tokenizer.decode(document.token_ids)


class TestWriteTexts:
    def test_a_killed_run_goes_on_to_the_same_file(self, llm: LLM, tmp_path: Path) -> None:
        whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
        lines: list[str] = []
        count = write_texts(llm, whole, 12, 7, SETTINGS, report=lines.append)
        assert count == len(list(read_conversations(whole))) >= 12
        assert lines[-1].startswith(f"batch {len(lines) - 1}: {count} of 12 texts")
        content = whole.read_bytes()
        killed.write_bytes(content[: len(content) * 2 // 3])
        write_texts(llm, killed, 12, 7, SETTINGS)
        assert killed.read_bytes() == content

    def test_a_file_that_has_enough_is_left_alone(self, llm: LLM, tmp_path: Path) -> None:
        path = tmp_path / "chats.jsonl"
        count = write_texts(llm, path, 1, 7, SETTINGS)
        before = path.read_bytes()
        assert write_texts(llm, path, count, 7, SETTINGS) == count
        assert path.read_bytes() == before

    def test_documents(self, llm: LLM, tmp_path: Path) -> None:
        path = tmp_path / "new" / "documents.jsonl"
        assert write_texts(llm, path, 1, 7, SETTINGS, chats=False) == SETTINGS.batch_size
        assert {document.user for document in read_conversations(path)} == {""}
