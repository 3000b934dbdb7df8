"""The tokenizer of a Hugging Face folder: `tokenizer.json` and the small files around it.

`tokenizer.json` alone decides how text becomes ids, BOS and EOS included: like transformers 5, this does not read
`add_bos_token` and `add_eos_token` of `tokenizer_config.json`.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from engine.errors import ModelLoadError
from engine.tokenizer_parts import TokenizerParts

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def load_folder(folder: Path) -> TokenizerParts:
    """Read the tokenizer of a Hugging Face folder. No code in the folder is run.

    Args:
        folder: Holds `tokenizer.json`; `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja`,
            `generation_config.json` and `config.json` are read where present.

    Raises:
        ModelLoadError: A file is missing or malformed.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelLoadError(
            f"{folder} has no tokenizer.json; transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) "
            "writes one from older formats"
        )
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        raise ModelLoadError(f"cannot read {path}: {error}") from error
    # Settings of the training run that some files carry; they would silently cut or pad prompts.
    backend.no_truncation()
    backend.no_padding()

    config = _read_json(folder / "tokenizer_config.json")
    tokens = _special_tokens(_read_json(folder / "special_tokens_map.json") | config)
    return TokenizerParts(backend, _eos_token_ids(folder, backend, tokens), tokens, _chat_template(folder, config))


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in _SPECIAL_TOKENS:
        token = config.get(name)
        if isinstance(token, dict):  # a serialised AddedToken
            token = token.get("content")
        if isinstance(token, str):
            tokens[name] = token
    return tokens


def _eos_token_ids(folder: Path, backend: Backend, tokens: dict[str, str]) -> tuple[int, ...]:
    ids: dict[int, None] = {}  # an ordered set
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        for token_id in value if isinstance(value, list) else [value]:
            if isinstance(token_id, int):
                ids[token_id] = None
    token_id = backend.token_to_id(tokens["eos_token"]) if "eos_token" in tokens else None
    if token_id is not None:
        ids[token_id] = None
    return tuple(ids)


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        by_name = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = by_name.get("default")
    return template if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object")
    return value
