"""An executable model of the device: runs StepPlans on page slots that remember exactly what was computed into them.

Owns the truth of tests. A page slot holds the id of the token prefix its KV belongs to; ids are exact (a table of
(shorter prefix, token) pairs, no hash), and prefixes of different namespaces differ. Moves run in order, then the
step writes all its KV, then every position that a query must see is read and compared. Any other content, a page that
two chunks of one step write, a host page that is overwritten, leaked or missing: AssertionError.
Tokens are sampled as a pure function of (prefix, child), so any schedule must give ``reference(request)``.
Owns no policy and imports nothing but ``jaxkv.types``.
"""

from __future__ import annotations

from hashlib import blake2b

from jaxkv.types import Chunk, Fetch, KVGroup, PageKey, PageMove, Request, StepPlan, StepResult, Tier

Page = list[int | None]  # [page_size] prefix id of each slot, None: never written


class _Slot:
    def __init__(self, request_id: str, groups: int) -> None:
        self.request_id = request_id
        self.rows: list[list[int]] = [[] for _ in range(groups)]


class SimDevice:
    """``apply`` runs a plan and returns its result; ``submit`` as the executor's, with a handle that is ready at once."""

    def __init__(self, groups: tuple[KVGroup, ...], page_size: int, num_pages: tuple[int, ...],
                 num_host_pages: tuple[int, ...] | None = None, vocab_size: int = 97) -> None:
        self.groups = groups
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.num_host_pages = num_host_pages or (0,) * len(groups)
        self.hbm: list[list[Page]] = [[[None] * page_size for _ in range(n)] for n in num_pages]
        self.host: list[dict[int, Page]] = [{} for _ in groups]
        self.computed: dict[str, int] = {}  # request id -> tokens that steps have run for it
        self.num_moves: dict[str, int] = {"demote": 0, "promote": 0, "drop": 0, "copy hbm": 0, "copy host": 0,
                                         "fetch host": 0, "fetch disk": 0, "save": 0}
        self.disk: dict[str, dict[int, Page]] = {}  # digest -> page of each group
        self.wrong: set[bytes] = set()  # digests that the disk tier is to forget
        self.staged: dict[int, list[tuple[PageMove, Page]]] = {}
        self.started: list[int] = []  # fetches, oldest first: tests say how each ends
        self._prefixes: dict[tuple[int, int], int] = {}
        self._roots: dict[str, int] = {}
        self._requests: dict[str, Request] = {}
        self._tokens: dict[str, list[int]] = {}  # prompt and everything sampled
        self._ids: dict[str, list[int]] = {}  # prefix id at each position of _tokens
        self._slots: dict[int, _Slot] = {}

    # ---- requests

    def add(self, request: Request) -> None:
        """Tell the device the truth about a request: without it, it could not check what is read."""
        root = self._roots.setdefault(request.namespace, -1 - len(self._roots))
        self._requests[request.id] = request
        self._tokens[request.id] = []
        self._ids[request.id] = []
        self.computed[request.id] = 0
        self._extend(request.id, request.prompt, root)

    def _extend(self, request_id: str, tokens: tuple[int, ...], root: int | None = None) -> None:
        ids = self._ids[request_id]
        for token in tokens:
            previous = ids[-1] if ids else root
            ids.append(self._prefixes.setdefault((previous, token), len(self._prefixes)))
            self._tokens[request_id].append(token)

    def sample(self, request: Request, tokens: list[int]) -> int:
        """The token after ``tokens``."""
        words = ",".join(map(str, (request.namespace, request.seed, request.child, *tokens)))
        return int.from_bytes(blake2b(words.encode(), digest_size=8).digest()) % self.vocab_size

    def reference(self, request: Request) -> list[int]:
        """What the request must answer under any schedule, up to max_tokens or a stop id."""
        tokens = list(request.prompt)
        for count in range(1, request.max_tokens + 1):
            tokens.append(self.sample(request, tokens))
            if tokens[-1] in request.stop_ids and count >= request.params.min_tokens:
                break
        return tokens[len(request.prompt):]

    # ---- plans

    def submit(self, plan: StepPlan) -> _Done:
        return _Done(self.apply(plan))

    def apply(self, plan: StepPlan) -> StepResult:
        """Run one plan. Raises AssertionError where a real device would have read something wrong."""
        for fetch_id, wanted in plan.landings:
            self._land(fetch_id, wanted)
        for move in plan.moves:
            self._move(move, plan.saves)
        for fetch in plan.fetches:
            self._start(fetch)
        for admit in plan.admits:
            self._slots[admit.slot] = _Slot(admit.request_id, len(self.groups))
        self._write(plan.chunks)
        for chunk in plan.chunks:
            self._read(chunk)
        return StepResult(tuple(self._sampled(chunk) for chunk in plan.chunks))

    def restore(self, host_pages: set[tuple[int, int]]) -> None:
        """HBM holds nothing any more, nothing is under way, and of the host pages these are left."""
        self.hbm = [[[None] * self.page_size for _ in pages] for pages in self.hbm]
        self.host = [{page: content for page, content in host.items() if (g, page) in host_pages}
                     for g, host in enumerate(self.host)]
        assert {(g, page) for g, host in enumerate(self.host) for page in host} == host_pages, "a host page never came"
        self.staged.clear()
        self.started.clear()

    def _start(self, fetch: Fetch) -> None:
        """Copy what the fetch reads: pages do not change on the way."""
        contents = []
        for move in fetch.moves:
            tier, page = move.src
            assert move.dst and move.dst[0] == Tier.HBM and move.last == (tier == Tier.HOST)
            contents.append(list(self.host[move.group][page]) if tier == Tier.HOST
                            else self.disk[fetch.keys[page].digest][move.group])
        assert fetch.id not in self.staged
        self.staged[fetch.id] = list(zip(fetch.moves, contents))
        self.started.append(fetch.id)

    def _land(self, fetch_id: int, wanted: bool) -> None:
        for move, content in self.staged.pop(fetch_id):
            if wanted:
                self.num_moves["fetch host" if move.last else "fetch disk"] += 1
                self.hbm[move.group][move.dst[1]] = list(content)
                if move.last:
                    del self.host[move.group][move.src[1]]

    def match(self, keys: list[bytes]) -> int:
        """As the disk tier would say."""
        missing = (i for i, key in enumerate(keys)
                   if key in self.wrong or len(self.disk.get(key.hex(), ())) < len(self.groups))
        return next(missing, len(keys))

    def forget(self, keys: list[bytes]) -> None:
        self.wrong.update(key for key in keys if key.hex() in self.disk)

    def _move(self, move: PageMove, saves: tuple[PageKey, ...]) -> None:
        (tier, page), dst, host = move.src, move.dst, self.host[move.group]
        if tier == Tier.HOST:
            assert page in host, f"{move}: the host page holds nothing"
        else:
            assert not move.last, f"{move}: last is for HOST sources"
        content = list(host[page] if tier == Tier.HOST else self.hbm[move.group][page])
        if tier == Tier.HOST and (move.last or dst is None):
            del host[page]
        if dst is not None and dst[0] == Tier.DISK:
            digest = saves[dst[1]].digest
            if bytes.fromhex(digest) in self.wrong:
                self.wrong.remove(bytes.fromhex(digest))
                del self.disk[digest]
            self.disk.setdefault(digest, {})[move.group] = content
            self.num_moves["save"] += 1
            return
        if dst is None:
            assert tier == Tier.HOST, f"{move}: only HOST pages are dropped by a move"
            self.num_moves["drop"] += 1
        elif dst[0] == Tier.HOST:
            assert tier == Tier.HBM and dst[1] not in host, f"{move}: the host page is in use"
            host[dst[1]] = content
            assert len(host) <= self.num_host_pages[move.group], "host memory exceeds its size"
            self.num_moves["demote"] += 1
        else:
            self.hbm[move.group][dst[1]] = content
            self.num_moves["copy hbm" if tier == Tier.HBM else "promote" if move.last else "copy host"] += 1

    def _write(self, chunks: tuple[Chunk, ...]) -> None:
        written: dict[tuple[int, int, int], str] = {}
        for chunk in chunks:
            slot = self._slots[chunk.slot]
            assert slot.request_id == chunk.request_id, f"slot {chunk.slot} belongs to {slot.request_id}"
            known = self._tokens[chunk.request_id]
            assert chunk.start + len(chunk.tokens) <= len(known), f"{chunk} runs past what was sampled"
            for position, token in enumerate(chunk.tokens, chunk.start):
                assert token in (-1, known[position]), f"{chunk}: position {position} is {known[position]}"
            self.computed[chunk.request_id] += len(chunk.tokens)
            for g, (first, pages) in enumerate(chunk.pages):
                assert first <= len(slot.rows[g]), f"{chunk}: a gap before page {first} of group {g}"
                slot.rows[g][first:] = pages
                for position in range(chunk.start, chunk.start + len(chunk.tokens)):
                    page, offset = slot.rows[g][position // self.page_size], position % self.page_size
                    assert page >= 0, f"{chunk}: no page for position {position} of group {g}"
                    other = written.setdefault((g, page, offset), chunk.request_id)
                    assert other == chunk.request_id, f"{other} and {chunk.request_id} write page {page} of group {g}"
                    self.hbm[g][page][offset] = self._ids[chunk.request_id][position]

    def _read(self, chunk: Chunk) -> None:
        ids, end = self._ids[chunk.request_id], chunk.start + len(chunk.tokens)
        for g, group in enumerate(self.groups):
            row = self._slots[chunk.slot].rows[g]
            start = 0 if group.window is None else max(0, chunk.start - group.window + 1)
            for position in range(start, end):
                page, offset = row[position // self.page_size], position % self.page_size
                assert page >= 0, f"{chunk}: group {g} has no page for visible position {position}"
                assert self.hbm[g][page][offset] == ids[position], \
                    f"{chunk.request_id} reads other KV at position {position} (group {g}, page {page})"

    def _sampled(self, chunk: Chunk) -> tuple[int, ...]:
        if not chunk.num_logits:
            return ()
        assert chunk.num_logits == 1, "drafts are not modelled"
        tokens, end = self._tokens[chunk.request_id], chunk.start + len(chunk.tokens)
        token = self.sample(self._requests[chunk.request_id], tokens[:end])
        if end == len(tokens):
            self._extend(chunk.request_id, (token,))
        assert tokens[end] == token
        return (token,)


class _Done:
    def __init__(self, result: StepResult) -> None:
        self._result = result

    def read(self) -> StepResult:
        return self._result
