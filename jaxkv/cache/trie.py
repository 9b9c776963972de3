"""Radix trie over token pages: which prefixes are cached, and which node owns each page.

Owns the tree, the digests and the search. Owns no page pool and no policy: it never decides what stays, and pages are
opaque numbers to it. A node is a run of full pages, or a *leaf* of one partly filled page without children. Runs split
at page borders only. The sequence that published a leaf may go on writing its page, past the leaf's length.

Tokens are stored as bytes, four per token: a run is compared by one memcmp, the first difference of two runs is one
XOR, and children sorted by the bytes of their first page have the longest common prefix with a query next to where the
query would be inserted.

The digest of a page hashes the digest of the page before it and its tokens, so it names a whole prefix however the path
is cut into nodes. A node goes by the digest of its first page (``key``): extending or cutting its tail does not rename
it. Hits compare tokens, never digests.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

from jaxkv.types import Kind, Tier

TOKEN_BYTES = array("i").itemsize
DIGEST_BYTES = 16


def encode(tokens: Sequence[int]) -> bytes:
    """Tokens as the trie stores them."""
    return array("i", tokens).tobytes()


def decode(data: bytes) -> list[int]:
    """Tokens of what ``encode`` gave."""
    return array("i", data).tolist()


def common_tokens(a: bytes, b: bytes) -> int:
    """Length in tokens of the longest common prefix of two encoded runs."""
    n = min(len(a), len(b))
    differing = int.from_bytes(a[:n], "big") ^ int.from_bytes(b[:n], "big")
    return (n - (differing.bit_length() + 7) // 8) // TOKEN_BYTES


class Node:
    """A run of pages that share a fate: kind, tier and users."""

    __slots__ = ("parent", "data", "digests", "start", "kind", "tier", "pages", "refs", "born", "settled", "hot",
                 "children", "order", "load", "saved", "moved", "session", "hits", "below")

    def __init__(self, parent: Node | None, data: bytes, digests: list[bytes], start: int, kind: Kind, tier: Tier,
                 pages: list[list[int]]) -> None:
        self.parent = parent
        self.data = data  # encoded tokens
        self.digests = digests  # one per page
        self.start = start  # position of the first token
        self.kind = kind
        self.tier = tier
        self.pages = pages  # [group][index] -> page of the node's tier, -1 where a window group has none
        self.refs = 0  # running sequences whose path passes the node
        self.born = -1  # latest plan known to compute a part of it ...
        self.settled = 0  # ... from this position on
        self.hot = 0  # children in HBM
        self.children: dict[bytes, Node] = {}  # by the encoded tokens of their first page
        self.order: list[bytes] = []  # keys of children, sorted
        self.load: Any = None  # what brings its pages, which hold nothing until then
        self.saved = 0  # leading pages that were handed to the disk tier
        self.moved = -1000  # plans that had ended when its tier changed last
        self.session: str | None = None  # the one session that used the node; None: several did
        self.hits = 0  # uses after the one that made it
        self.below = 0  # pages of the node and of all nodes below it

    def __len__(self) -> int:
        """Pages."""
        return len(self.digests)

    @property
    def key(self) -> bytes:
        """Name of the node for eviction policies: digest of the path up to its first page."""
        return self.digests[0]

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.data) // TOKEN_BYTES


class Root(Node):
    """The empty prefix of a namespace. Always in HBM, holds no page."""

    __slots__ = ("namespace",)

    def __init__(self, namespace: str, digest: bytes) -> None:
        super().__init__(None, b"", [digest], 0, Kind.PROMPT, Tier.HBM, [])
        self.namespace = namespace

    def __len__(self) -> int:
        return 0


def _count(node: Node | None, pages: int) -> None:
    """So many pages more below a node, itself included."""
    while node is not None:
        node.below += pages
        node = node.parent


class Source(NamedTuple):
    """A page whose first ``tokens`` tokens continue a match."""

    node: Node
    page: int  # index in the node
    tokens: int

    def ready(self, plan_id: int, page_size: int) -> bool:
        """Whether every group has the page and plan ``plan_id``, whose moves run before its step, only reads it."""
        node = self.node
        done = node.born != plan_id or node.start + self.page * page_size + self.tokens <= node.settled
        return done and node.load is None and all(pages[self.page] >= 0 for pages in node.pages)


class Match(NamedTuple):
    """What the trie has of a query: whole pages along a path, then perhaps part of one page."""

    path: list[Node]  # root first; the last node may match in part
    pages: int  # whole pages that match
    sources: list[Source]  # where the page after those can be copied from, best first


class Trie:
    """One root per namespace; ``salt`` names everything else that KV depends on (model, layout, adapter)."""

    def __init__(self, page_size: int, salt: str) -> None:
        self.page_size = page_size
        self.page_bytes = page_size * TOKEN_BYTES
        self.roots: dict[str, Root] = {}
        self._salt = blake2b(salt.encode(), digest_size=64).digest()

    def root(self, namespace: str) -> Root:
        """The root of a namespace, made when it is first needed."""
        node = self.roots.get(namespace)
        if node is None:
            digest = blake2b(namespace.encode(errors="surrogatepass"), digest_size=DIGEST_BYTES, key=self._salt).digest()
            node = self.roots[namespace] = Root(namespace, digest)
        return node

    def prune(self, node: Node) -> None:
        """Forget a root that holds nothing and that nobody uses; other nodes stay."""
        if isinstance(node, Root) and not node.children and not node.refs:
            del self.roots[node.namespace]

    def partial(self, node: Node) -> bool:
        """Whether the node is a leaf with a partly filled page."""
        return 0 < len(node.data) < self.page_bytes

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots, parents first."""
        stack: list[Node] = list(self.roots.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if node.parent is not None:
                yield node

    def page_names(self, namespace: str, tokens: Sequence[int]) -> list[bytes]:
        """The digests of the pages of ``tokens``."""
        root = self.root(namespace)
        self.prune(root)
        return self.digest(root.digests[-1], encode(tokens))

    def holders(self, namespace: str, tokens: Sequence[int]) -> Iterator[Node]:
        """Nodes that hold some of ``tokens`` where they are, top first: by a whole first page, or as leaves that fill a part of
        one. A node may be dropped when it was given."""
        node: Node | None = self.roots.get(namespace)
        data = encode(tokens)
        while node is not None:
            below, data = node.children, data[len(node.data):]
            starts = [data[:end] for end in range(TOKEN_BYTES, min(len(data), self.page_bytes) + 1, TOKEN_BYTES)]
            found = [below[start] for start in starts if start in below]
            yield from found
            node = next((one for one in found if not self.partial(one) and data.startswith(one.data)), None)

    # ---- search

    def match(self, root: Node, data: bytes) -> Match:
        """The longest prefix of ``data`` (encoded) below ``root``."""
        size, at, node, path = self.page_bytes, 0, root, [root]
        while True:
            first = data[at:at + size]
            child = node.children.get(first)
            if child is None or len(child.data) < size:
                return Match(path, at // size, self.sources(node, first))
            path.append(child)
            if not data.startswith(child.data, at):
                common = common_tokens(data[at:at + len(child.data)], child.data)
                cut, rest = divmod(common, self.page_size)
                return Match(path, at // size + cut, [Source(child, cut, rest)] if rest else [])
            at += len(child.data)
            node = child

    def sources(self, node: Node, data: bytes) -> list[Source]:
        """Children of ``node`` whose first page starts like ``data`` (at most one page, encoded), longest first."""
        at = bisect_left(node.order, data)
        found = []
        for key in node.order[max(0, at - 1):at + 1]:
            tokens = common_tokens(key, data)
            if tokens:
                found.append(Source(node.children[key], 0, tokens))
        found.sort(key=lambda source: (-source.tokens, source.node.tier))
        return found

    # ---- change

    def digest(self, parent: bytes, data: bytes) -> list[bytes]:
        """Digests of the pages of ``data``, which follow the page with digest ``parent``."""
        digests = []
        for at in range(0, len(data), self.page_bytes):
            parent = blake2b(parent + data[at:at + self.page_bytes], digest_size=DIGEST_BYTES).digest()
            digests.append(parent)
        return digests

    def attach(self, parent: Node, data: bytes, kind: Kind, pages: list[list[int]]) -> Node:
        """A new HBM node below ``parent`` for the run ``data``."""
        node = Node(parent, data, self.digest(parent.digests[-1], data), parent.end, kind, Tier.HBM, pages)
        first = data[:self.page_bytes]
        assert first not in parent.children
        parent.children[first] = node
        insort(parent.order, first)
        parent.hot += 1
        _count(node, len(node))
        return node

    def extend(self, node: Node, data: bytes, pages: list[list[int]]) -> None:
        """Append full pages to a node without children."""
        node.digests += self.digest(node.digests[-1], data)
        node.data += data
        for mine, new in zip(node.pages, pages, strict=True):
            mine += new
        _count(node, len(data) // self.page_bytes)

    def detach(self, node: Node) -> None:
        """Take a node without children out of the tree."""
        parent, first = node.parent, node.data[:self.page_bytes]
        assert parent is not None and not node.children
        del parent.children[first]
        del parent.order[bisect_left(parent.order, first)]
        parent.hot -= node.tier is Tier.HBM
        node.parent = None
        _count(parent, -len(node))

    def split(self, node: Node, count: int) -> Node:
        """Cut a run after ``count`` pages. The new node is the upper part; ``node`` stays the end of its path."""
        assert 0 < count < len(node)
        parent, size, at = node.parent, self.page_bytes, count * self.page_bytes
        assert parent is not None
        upper = Node(parent, node.data[:at], node.digests[:count], node.start, node.kind, node.tier,
                     [pages[:count] for pages in node.pages])
        upper.born, upper.settled, upper.moved = node.born, node.settled, node.moved
        upper.saved = min(node.saved, count)
        node.saved -= upper.saved
        if node.load is not None:
            upper.load = node.load
            node.load.nodes.append(upper)
        upper.refs = node.refs
        upper.session, upper.hits = node.session, node.hits
        upper.hot = int(node.tier is Tier.HBM)
        upper.below = node.below
        node.below -= count
        parent.children[node.data[:size]] = upper
        node.parent = upper
        node.data = node.data[at:]
        del node.digests[:count]
        node.start += count * self.page_size
        for pages in node.pages:
            del pages[:count]
        first = node.data[:size]
        upper.children[first] = node
        upper.order.append(first)
        return upper
