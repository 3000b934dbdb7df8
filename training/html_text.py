"""The readable text of an HTML page."""

import re
from collections.abc import Collection
from html.parser import HTMLParser

_NO_TEXT = frozenset({"script", "style", "title", "template"})
_VOID = frozenset(
    {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
)
_PARAGRAPH = frozenset(
    {"article", "aside", "blockquote", "body", "dl", "div", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5"}
    | {"h6", "header", "hr", "main", "nav", "ol", "p", "pre", "section", "table", "ul"}
)
_LINE = frozenset({"br", "caption", "dd", "dt", "li", "tr"})
_CELL = frozenset({"td", "th"})


def html_to_text(html: str, skip: Collection[str] = ()) -> str:
    """Text of a page: paragraphs apart by an empty line, items of a list by `- `, preformatted lines as they are.

    Never fails: what is no HTML comes back as text.

    Args:
        html: A whole page or a part of one.
        skip: Elements to leave out, such as a site's navigation, as `.class` or `#id`.
    """
    parser = _TextParser(frozenset(skip))
    parser.feed(html)
    parser.close()
    return parser.text()


class _TextParser(HTMLParser):
    """Collects text. Line breaks are only asked for, and written before the next text: so none pile up."""

    def __init__(self, skip: frozenset[str]) -> None:
        super().__init__(convert_charrefs=True)
        self._skip = skip
        self._parts: list[str] = []
        self._newlines = 0
        self._space = False
        self._bullet = ""
        self._preformatted = 0
        # Depth is counted in elements of the same name only, as an unclosed <p> in a skipped <div> must not matter.
        self._skipped_tag = ""
        self._skipped_depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipped_depth:
            self._skipped_depth += tag == self._skipped_tag
            return
        if tag in _NO_TEXT or self._is_skipped(attrs):
            if tag not in _VOID:
                self._skipped_tag, self._skipped_depth = tag, 1
            return
        self._break_at(tag)
        if tag == "pre":
            self._preformatted += 1
        elif tag == "li":
            self._bullet = "- "

    def handle_endtag(self, tag: str) -> None:
        if self._skipped_depth:
            self._skipped_depth -= tag == self._skipped_tag
            return
        if tag == "pre":
            self._preformatted = max(self._preformatted - 1, 0)
        if tag == "li":
            self._bullet = ""
        self._break_at(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if not self._skipped_depth and not self._is_skipped(attrs):
            self._break_at(tag)

    def handle_data(self, data: str) -> None:
        if self._skipped_depth:
            return
        if self._preformatted:
            if data.strip() or self._newlines == 0:
                self._write(data)
            return
        words = data.split()
        if not words:
            self._space = True
            return
        self._space |= data[0].isspace()
        self._write(" ".join(words))
        self._space = data[-1].isspace()

    def text(self) -> str:
        text = "".join(self._parts).replace("\xa0", " ")
        return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()

    def _is_skipped(self, attrs: list[tuple[str, str | None]]) -> bool:
        marks = {"class": ".", "id": "#"}
        names = (marks[name] + word for name, value in attrs if name in marks for word in (value or "").split())
        return not self._skip.isdisjoint(names)

    def _break_at(self, tag: str) -> None:
        if self._bullet:  # <li><p>: the text belongs on the bullet's own line
            return
        if tag in _PARAGRAPH:
            self._newlines = 2
        elif tag in _LINE:
            self._newlines = max(self._newlines, 1)
        elif tag in _CELL:
            self._space = True

    def _write(self, text: str) -> None:
        if self._newlines and self._parts:
            self._parts.append("\n" * self._newlines)
        elif self._space and self._parts:
            self._parts.append(" ")
        self._parts.append(self._bullet + text)
        self._newlines, self._space, self._bullet = 0, False, ""
