"""<think>reasoning</think> before the answer, also where the template has written the opening tag into the prompt."""

from __future__ import annotations

from jaxkv.serve.parsers.base import overlap

BEGIN, END = "<think>", "</think>"


class ThinkParser:
    """Splits an answer into (reasoning, answer). White space that begins either one belongs to the tags.

    ``inside``: the reasoning has begun before the first character. Tags count only where an answer may begin.
    """

    markers = (BEGIN, END)

    def __init__(self, inside: bool) -> None:
        self.inside = self.begun = inside
        self.done = False  # nothing but the answer follows
        self._fresh = True  # only white space since the beginning, or since the last tag
        self._held = ""

    def feed(self, text: str) -> tuple[str, str]:
        """What is certain by now."""
        if self.done and not self._fresh:
            return "", text
        self._held += text
        reasoning = ""
        while self._held:
            if self._fresh and not self._begin():
                return reasoning, ""
            if not self.inside:
                self.done = True
                return reasoning, self._take(len(self._held))
            at = self._held.find(END)
            if at < 0:
                return reasoning + self._take(len(self._held) - overlap(self._held, END)), ""
            reasoning += self._take(at)
            self._take(len(END))
            self.inside, self._fresh, self.done = False, True, True
        return reasoning, ""

    def finish(self) -> tuple[str, str]:
        """What was held back."""
        held = self._take(len(self._held))
        if self._fresh and (self.done or self.inside):
            held = held.lstrip()
        return (held, "") if self.inside else ("", held)

    def _begin(self) -> bool:
        """Whether the first character is there that is neither white space nor a part of the opening tag."""
        text = self._held.lstrip()
        while not self.done and text.startswith(BEGIN):
            self.inside = self.begun = True
            self._held = text = text[len(BEGIN):].lstrip()
        if not text or not self.done and BEGIN.startswith(text):
            return False
        if self.done or self.inside:
            self._held = text
        self._fresh = False
        return True

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text
