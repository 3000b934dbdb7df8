"""What several commands need: their options as a configuration, progress on standard error, errors as one line."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from engine import EngineConfig

USAGE_ERROR = 2


def given(context: typer.Context, names: set[str]) -> dict[str, Any]:
    """The command's parameters among `names` that the user has set; unset ones keep the default of who reads them."""
    return {name: value for name, value in context.params.items() if name in names and value not in (None, [], ())}


def engine_config(context: typer.Context) -> "EngineConfig":
    """The engine that the command's options describe."""
    from engine import EngineConfig

    return EngineConfig(**given(context, {field.name for field in fields(EngineConfig)}))


def progress_on(console: Console) -> Callable[[str], None]:
    """Prints a line before each long step."""
    return lambda line: console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def garbage_ignored() -> Iterator[None]:
    """Import torch and its like without garbage collections, half a second of the start.

    Modules live as long as the process, and Python would look through all of their objects again and again while they
    are made. Collections later, of a serving process, leave them alone as well.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def errors_as_one_line(*kinds: type[Exception]) -> Iterator[None]:
    """End with one line and exit status 2 on errors that the user can mend; others keep their traceback."""
    try:
        yield
    except kinds as error:
        Console(stderr=True).print(Text.assemble(("Error: ", "bold red"), str(error)), soft_wrap=True)
        raise typer.Exit(USAGE_ERROR) from error


def check_writable(path: Path | None, option: str) -> None:
    """Refuse a file whose folder does not exist: now, and not after an hour of work.

    Raises:
        typer.BadParameter: Names the option.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent}", param_hint=option)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a document, indented. Numbers that are not finite become null."""
    path.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
