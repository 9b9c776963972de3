"""The children of one request: its prompt is computed once, by child 0, and the others find it in the cache.

Owns for whom the others wait. Owns no order and no sequence.
"""

from __future__ import annotations

from jaxkv.sequence import Sequence
from jaxkv.types import Request


class Siblings:
    """Which requests have a child 0 whose prompt is not in the cache yet."""

    def __init__(self) -> None:
        self._leading: set[str] = set()  # parents whose siblings wait for child 0's prompt
        self._led: list[str] = []  # those whose child 0 finished its prompt in the latest plan

    def begin(self) -> None:
        """A plan begins: prompts that the plan before it finished can be found."""
        if self._led:
            self._leading.difference_update(self._led)
            self._led.clear()

    def add(self, request: Request) -> None:
        """A request comes whose KV will be kept in the cache."""
        if request.child == 0 and request.params.n > 1:
            self._leading.add(request.parent)

    def wait(self, seq: Sequence) -> bool:
        """Whether a sequence had better enter later. One that owes log-probabilities of its prompt runs all of it anyway."""
        return seq.request.child > 0 and seq.request.parent in self._leading and not seq.owes_prompt_logprobs

    def prompt_ends(self, request: Request) -> None:
        """The plan under construction finishes a prompt."""
        if request.child == 0 and request.parent in self._leading:
            self._led.append(request.parent)

    def gone(self, request: Request) -> None:
        """A sequence ended or was preempted: nobody waits for it."""
        if request.child == 0:
            self._leading.discard(request.parent)
