"""Text of a sample while it is generated, token by token, up to a stop string."""

from codecs import getincrementaldecoder

from engine.tokenizer import Tokenizer

_Utf8Decoder = getincrementaldecoder("utf-8")


class Detokenizer:
    """Turns the tokens of one sample into text that is safe to show at once.

    Held back are the bytes of an incomplete character, and the longest end of the text that may be the beginning of a
    stop string. All pieces together equal `tokenizer.decode(ids, skip_special_tokens, continuation)`, cut before the
    first stop string. First is the one that is complete first, whatever tokens it is made of; of those that end at the
    same character, the longest. The cost of a token does not depend on how long the text is.

    Args:
        tokenizer: Decodes the tokens.
        stop: Strings that end the text, none of them empty; they are not part of it.
        skip_special_tokens: Leave out special tokens such as EOS.
        continuation: The tokens continue a prompt (see `Tokenizer.decode`).

    Attributes:
        stop_reason: The stop string that ended the text, None as long as none did. Tokens after it are ignored.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        skip_special_tokens: bool = True,
        continuation: bool = True,
    ) -> None:
        self.stop_reason: str | None = None
        self._pieces = tokenizer.pieces(skip_special_tokens)
        self._utf8 = _Utf8Decoder("replace")
        self._prefix_spaces = 0 if continuation else tokenizer.prefix_spaces
        self._stop = stop
        self._stop_initials = frozenset(text[0] for text in stop)
        self._longest_stop = max(map(len, stop), default=0)
        self._held = ""  # end of the text so far that may be the beginning of a stop string

    def append(self, token_id: int, may_stop: bool = True) -> str:
        """Take the next token.

        Args:
            token_id: Any id; one outside the vocabulary has no text.
            may_stop: Whether stop strings are looked for from this token on.

        Returns:
            The text that became safe to show, often that of this token, possibly empty.
        """
        if self.stop_reason is not None or not 0 <= token_id < len(self._pieces):
            return ""
        return self._take(self._utf8.decode(self._pieces[token_id]), may_stop)

    def finish(self) -> str:
        """End the text: what was held back, an incomplete character as U+FFFD. Empty after a stop string."""
        if self.stop_reason is not None:
            return ""
        text = self._take(self._utf8.decode(b"", final=True), may_stop=True) + self._held
        self._held = ""
        return text

    def _take(self, text: str, may_stop: bool) -> str:
        while self._prefix_spaces and text:
            self._prefix_spaces = self._prefix_spaces - 1 if text[0] == " " else 0
            text = text.removeprefix(" ")
        if not self._stop or not may_stop or not text:
            return text
        text = self._held + text
        if (stop := self._first_stop(text)) is not None:
            self.stop_reason = stop
            self._held = ""
            return text[: text.find(stop)]
        shown = self._safe_length(text)
        self._held = text[shown:]
        return text[:shown]

    def _first_stop(self, text: str) -> str | None:
        """The stop string that is complete first in `text`."""
        first, first_end = None, len(text) + 1
        for stop in self._stop:
            start = text.find(stop)
            if start < 0:
                continue
            end = start + len(stop)
            if end < first_end or (end == first_end and first is not None and len(stop) > len(first)):
                first, first_end = stop, end
        return first

    def _safe_length(self, text: str) -> int:
        """Length of `text` without its longest end that a stop string begins with."""
        for start in range(max(0, len(text) - self._longest_stop + 1), len(text)):
            if text[start] in self._stop_initials:
                end = text[start:]
                if any(stop.startswith(end) for stop in self._stop):
                    return start
        return len(text)
