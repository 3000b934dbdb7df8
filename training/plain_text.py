"""Cleaning of text that was set for a screen of fixed width."""

import re

SLACK = 12  # editors do not fill every line as a machine would
CONTENTS_RUN, CONTENTS_ENTRY = 8, 70  # so many paragraphs in a row, each shorter than so many characters

# An item of a list, or a row of a drawn table.
_OWN_LINE = re.compile(r"(?:[*+o•-]|\(?\d{1,2}[.)]|\(?[a-z]\))\s+\S|[─-╿]")
_RULE = re.compile(r"^[ \t]*([-=_*═─~])\1{3,}[ \t]*$", re.MULTILINE)


def unwrap(text: str) -> str:
    """Join the lines of paragraphs; paragraphs stay apart by one empty line.

    A line is joined to the one before if its first word would not have fitted there. So verse, addresses, listings and
    the items of lists keep their lines. The indentation that a paragraph's lines have in common is removed, as are
    lines that are drawn rules.
    """
    text = text.replace("\xa0", " ")
    blocks = [block.expandtabs().split("\n") for block in re.split(r"\n[ \t]*\n+", _RULE.sub("", text))]
    width = _text_width([line for block in blocks for line in block])
    paragraphs = (_join_lines([line.rstrip() for line in block if line.strip()], width) for block in blocks)
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def drop_contents(text: str) -> str:
    """Leave out tables of contents: many short paragraphs of one line in a row."""
    kept: list[str] = []
    run: list[str] = []
    for paragraph in [*text.split("\n\n"), None]:
        if paragraph is not None and _is_entry(paragraph):
            run.append(paragraph)
            continue
        # The last one is the heading of what follows.
        kept += run if len(run) < CONTENTS_RUN else run[-1:]
        run = []
        if paragraph is not None:
            kept.append(paragraph)
    return "\n\n".join(kept)


def _text_width(lines: list[str]) -> int:
    """The width a text is set in: nine of ten lines of more than half a screen are no longer."""
    lengths = sorted(len(line.rstrip()) for line in lines if len(line.rstrip()) > 40)
    return lengths[len(lengths) * 9 // 10] if lengths else 80


def _join_lines(lines: list[str], width: int) -> str:
    if not lines:
        return ""
    indent = min(len(line) - len(line.lstrip()) for line in lines)
    joined: list[str] = []
    previous = 0  # length of the line before, as it was set
    for line in lines:
        words = line.strip()
        fitted = previous + 1 + len(words.split(" ", 1)[0]) <= width - SLACK
        if joined and not fitted and not _OWN_LINE.match(words):
            joined[-1] += " " + words
        else:
            joined.append(line[indent:])
        previous = len(line)
    return "\n".join(_single_spaces(line) for line in joined)


def _single_spaces(line: str) -> str:
    """Two spaces after a sentence become one; columns and indentation stay."""
    return re.sub(r"(?<=[.!?:;,\"'”)])  (?=\S)", " ", line)


def _is_entry(paragraph: str) -> bool:
    return "\n" not in paragraph and len(paragraph) < CONTENTS_ENTRY
