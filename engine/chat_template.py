"""Chat messages to a prompt, as a model's own Jinja template writes it.

Templates are written for transformers, and this is the dialect that it gives them: Jinja's sandbox, `break` and
`continue`, `{% generation %}` blocks, `tojson`, `raise_exception` and `strftime_now`. transformers itself takes a
second to import, for this one function; the tests compare the two.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from engine.errors import ModelLoadError


class ChatTemplate:
    """A compiled template. Nothing in it changes, so any number of threads may render at once.

    Args:
        source: Jinja. It comes with the checkpoint and is not trusted: it runs in Jinja's sandbox.
        special_tokens: Text of `bos_token`, `eos_token`, ... by these names.

    Raises:
        ModelLoadError: The source is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except Exception as error:  # Python's own, too: Jinja compiles to it, and it has limits of nesting
            raise ModelLoadError(f"the model's chat template is not valid Jinja: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The prompt.

        Args:
            messages: `{"role": ..., "content": ...}` and whatever else the template reads, of JSON's types only: the
                sandbox cannot know which methods of other objects are safe to call.
            add_generation_prompt: End with the beginning of the assistant's answer.

        Raises:
            Exception: Of any kind: a template is a program of the checkpoint's author.
        """
        return self._template.render(
            messages=json.loads(json.dumps([_with_reasoning(message) for message in messages])),
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._special_tokens,
        )


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose reasoning, if it has any, is found under each name that templates read it by."""
    named = (message.get(name) for name in ("reasoning_content", "thinking", "reasoning"))
    reasoning = next((text for text in named if text is not None), None)
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _DictMaker()
    environment.globals["namespace"] = _namespace
    return environment


class _GenerationBlocks(Extension):
    """`{% generation %}` marks the assistant's words for training; a prompt has them like any other text."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _DictMaker:
    """Makes dictionaries like `dict`, whose other methods would change what they are given."""

    def __call__(self, *values: Any, **named: Any) -> dict[Any, Any]:
        return dict(*values, **named)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """Jinja's, without the special methods that code outside the sandbox would look up and call."""

    def __setitem__(self, name: str, value: object) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _namespace(*values: Any, **named: Any) -> Namespace:
    attributes = dict(*values, **named)
    for name in attributes:
        _check_attribute(name)
    return _Namespace(attributes)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the attribute {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; Jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
