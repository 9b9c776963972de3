"""One sequence, one step: how many tokens run, the chunk that says so, and what is learnt from it.

Owns the length rule, the translation of a live Sequence into a ``Chunk`` value and the end of a sequence by its own
tokens. Owns no page and no order.
"""

from __future__ import annotations

from jaxkv.types import Chunk, Sequence


def chunk_length(seq: Sequence, room: int) -> int:
    """Tokens to run next, at most ``room``: all that is missing, split where owed prompt log-probabilities begin."""
    start = seq.num_scheduled
    length = min(len(seq.tokens) + seq.in_flight - start, room)
    if start < seq.num_reported and seq.owes_prompt_logprobs:  # recomputed after a preemption: already reported
        length = min(length, seq.num_reported - start)
    return length


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
