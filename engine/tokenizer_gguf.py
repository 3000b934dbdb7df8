"""The tokenizer that a GGUF file carries in its metadata.

How text is split before merging (`tokenizer.ggml.pre`) is only a name in the file; `_PRE_TOKENIZERS` knows what the
name means. An unknown name is refused: a guess would give plausible but wrong tokens.
"""

from dataclasses import dataclass

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from engine.errors import ModelLoadError
from engine.models.gguf_file import GgufFile, GgufMetadata
from engine.tokenizer_parts import TokenizerParts, frame_texts

# Values of tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

# Many files name one end-of-sequence token only, while chat turns or documents end with another of these.
_END_OF_TEXT = frozenset({"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>"})

_SPACE = "▁"  # how SentencePiece writes a space


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """What a value of `tokenizer.ggml.pre` stands for.

    Attributes:
        split: Regular expression whose matches are the words; None is GPT-2's.
        digits: Each digit is a word, before anything else is split.
        nfc: Text is brought to Unicode's composed form first.
        ignore_merges: A word that is a token is taken whole, even where no merges lead to it.
        add_bos: Whether texts begin with the BOS token if the file does not say.
    """

    split: str | None = None
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


def _tiktoken_split(numbers: str) -> str:
    """The splitting rule of cl100k and its descendants, which differ in how they split numbers."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_GPT2 = _PreTokenizer()
_LLAMA3 = _PreTokenizer(split=_tiktoken_split(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True)
_QWEN2 = _PreTokenizer(split=_tiktoken_split(r"\p{N}"), nfc=True)
_PRE_TOKENIZERS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _PreTokenizer(digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    # SmolLM3 and some Llama 3 fine-tunes
    "smaug-bpe": _PreTokenizer(split=_LLAMA3.split, ignore_merges=True),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def load_gguf(file: GgufFile) -> TokenizerParts:
    """Build the tokenizer of a GGUF file from its metadata.

    Args:
        file: The file. `tokenizer.ggml.model` must be `"gpt2"` (byte-level BPE) or `"llama"` (SentencePiece BPE).

    Raises:
        ModelLoadError: The metadata are incomplete or inconsistent, or name a tokenizer that is not supported.
    """
    metadata, name = file.metadata, file.path.name
    tokens = metadata.strings("tokenizer.ggml.tokens")
    types = metadata.integers("tokenizer.ggml.token_type")
    if len(types) != len(tokens):
        raise ModelLoadError(f"{name}: {len(tokens)} tokens but {len(types)} token types")
    special = {
        role: _token(tokens, metadata, f"tokenizer.ggml.{key}_token_id")
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    model = metadata.string("tokenizer.ggml.model")
    try:
        if model == "gpt2":
            backend, add_bos = _byte_level(metadata, tokens)
        elif model == "llama":
            backend, add_bos = _sentencepiece(metadata, tokens, types, special["unk"])
        else:
            raise ModelLoadError(
                f"{name}: tokenizer model {model!r} is not supported; supported are 'gpt2' and 'llama'"
            )
        _add_tokens(backend, tokens, types)
        frame_texts(
            backend,
            special["bos"] if metadata.boolean("tokenizer.ggml.add_bos_token", add_bos) else None,
            special["eos"] if metadata.boolean("tokenizer.ggml.add_eos_token", False) else None,
        )
    except ModelLoadError:
        raise
    except Exception as error:  # tokenizers raises nothing more specific
        raise ModelLoadError(f"{name}: the tokenizer is inconsistent: {error}") from error
    return TokenizerParts(
        backend,
        _eos_token_ids(metadata, tokens, types),
        {f"{role}_token": token for role, token in special.items() if token is not None},
        metadata.string("tokenizer.chat_template"),
    )


def _byte_level(metadata: GgufMetadata, tokens: list[str]) -> tuple[Backend, bool]:
    name = metadata.string("tokenizer.ggml.pre") or "default"
    if name not in _PRE_TOKENIZERS:
        known = ", ".join(f"'{known}'" for known in _PRE_TOKENIZERS)
        raise ModelLoadError(f"pre-tokenizer (tokenizer.ggml.pre) '{name}' is not supported; supported are {known}")
    pre = _PRE_TOKENIZERS[name]
    merges = []
    for merge in metadata.strings("tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if pre.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pre.split is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.split is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend, pre.add_bos


def _sentencepiece(
    metadata: GgufMetadata, tokens: list[str], types: list[int], unknown: str | None
) -> tuple[Backend, bool]:
    scores = metadata.floats("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise ModelLoadError(f"{len(tokens)} tokens but {len(scores)} token scores")
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    backend = Backend(
        models.BPE(
            vocab=vocab,
            merges=_merges_from_scores(vocab, scores, types),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    add_space = metadata.boolean("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if add_space else replace
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if add_space else []),
        ]
    )
    return backend, True


def _merges_from_scores(vocab: dict[str, int], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """The merge list that makes BPE do what SentencePiece does.

    SentencePiece joins the neighbours whose union has the highest score. So each way to split a token in two tokens is
    a merge, ranked by the score of the whole, ties by the ids of its parts.
    """
    ranked = []
    for token, token_id in vocab.items():
        if types[token_id] != _NORMAL:
            continue  # matched whole, or bytes: never the result of a merge
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[token_id], left, right, token[:cut], token[cut:]))
    ranked.sort()
    return [(left, right) for _, _, _, left, right in ranked]


def _add_tokens(backend: Backend, tokens: list[str], types: list[int]) -> None:
    """Tokens that are found in a text before it is split: special ones (hidden in the output) and user-defined ones."""
    added = []
    for token, kind in zip(tokens, types, strict=True):
        if token and kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            added.append(AddedToken(token, special=kind != _USER_DEFINED, normalized=False))
    backend.add_tokens(added)


def _token_id(tokens: list[str], metadata: GgufMetadata, key: str) -> int | None:
    token_id = metadata.integer(key)
    if token_id is not None and not 0 <= token_id < len(tokens):
        raise ModelLoadError(f"{key} is {token_id}, outside the vocabulary of {len(tokens)} tokens")
    return token_id


def _token(tokens: list[str], metadata: GgufMetadata, key: str) -> str | None:
    token_id = _token_id(tokens, metadata, key)
    return None if token_id is None else tokens[token_id]


def _eos_token_ids(metadata: GgufMetadata, tokens: list[str], types: list[int]) -> tuple[int, ...]:
    named = (_token_id(tokens, metadata, f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    ids = [token_id for token_id in named if token_id is not None]
    ids += [i for i, token in enumerate(tokens) if token in _END_OF_TEXT and types[i] == _CONTROL]
    return tuple(dict.fromkeys(ids))
