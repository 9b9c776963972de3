"""One sequence, one step: how many tokens run, the chunk that says so, and what is learnt from it.

Owns the length rule, the translation of a live Sequence into a ``Chunk`` value and the end of a sequence by its own
tokens. Owns no page and no order.
"""

from __future__ import annotations

from jaxkv.sequence import Sequence
from jaxkv.types import Chunk

STEP_TOKENS = 64  # what a step costs besides its tokens, in tokens: about 40 on a CPU, more on an accelerator


def chunk_length(seq: Sequence, room: int) -> int:
    """Tokens to run next, at most ``room``: all that is missing, split where owed prompt log-probabilities begin."""
    start = seq.num_scheduled
    length = min(len(seq.tokens) + seq.in_flight - start, room)
    if start < seq.num_reported and seq.owes_prompt_logprobs:  # recomputed after a preemption: already reported
        length = min(length, seq.num_reported - start)
    return length


def excess_tokens(total: int, last: int, sizes: tuple[int, ...]) -> int:
    """Of a step of ``total`` tokens, those that its last chunk (``last`` tokens) had better leave to the next step.

    A step runs padded to one of ``sizes`` (ascending), so a few tokens more than a size can cost as much as twice that size.
    Tokens are left over when two steps are cheaper, a step costing its size and STEP_TOKENS for reading the weights.
    """
    def cost(tokens: int) -> int:
        return next((size for size in sizes if size >= tokens), tokens) + STEP_TOKENS

    best, excess = cost(total) - 1, 0
    for size in sizes:
        if total - last < size < total and cost(size) + cost(total - size) <= best:  # at a tie more tokens now
            best, excess = cost(size) + cost(total - size), total - size
    return excess


def take_chunk(seq: Sequence, start: int) -> Chunk:
    """The chunk [start, seq.num_scheduled) of a sequence whose pages cover it.

    Marks what the step will have done: page rows sent, a token sampled, prompt log-probabilities reported. The last
    known position yields logits, earlier ones do not. Token values that the host does not know yet are -1.
    """
    end = seq.num_scheduled
    tokens = seq.tokens
    known = len(tokens)
    values = tuple(tokens[start:end]) if start < known else (-1,)
    num_logits = 1 if end == known + seq.in_flight else 0
    seq.in_flight += num_logits
    dirty = seq.dirty
    rows = []
    for group, pages in enumerate(seq.pages):
        first = dirty[group]
        rows.append((first, tuple(pages[first:])))
        dirty[group] = len(pages)
    if start < seq.num_reported or not seq.owes_prompt_logprobs:
        return Chunk(seq.request.id, seq.slot, start, values, num_logits, tuple(rows))
    prompt = seq.request.prompt
    seq.num_reported = end
    return Chunk(seq.request.id, seq.slot, start, values, num_logits, tuple(rows),
                 prompt[end] if end < len(prompt) else -1, True)


def append_tokens(seq: Sequence, tokens: tuple[int, ...]) -> tuple[int, str | None]:
    """Append what a step sampled, up to the end of the sequence; how many that were, and the reason if it ended."""
    seq.in_flight -= len(tokens)
    request = seq.request
    outputs = len(seq.tokens) - len(request.prompt)
    for count, token in enumerate(tokens, 1):
        seq.tokens.append(token)
        if token in request.stop_ids and outputs + count >= request.params.min_tokens:
            return count, "stop"
        if outputs + count >= request.max_tokens:
            return count, "length"
    return len(tokens), None
