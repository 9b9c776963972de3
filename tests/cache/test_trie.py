from hypothesis import given
from hypothesis import strategies as st

from jaxkv.cache.trie import DIGEST_BYTES, Trie, common_tokens, encode
from jaxkv.types import Kind, Tier

TOKENS = st.lists(st.sampled_from([0, 1, 255, 256, 70000]), max_size=12)


def lcp(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def attach(trie, parent, tokens, page=0):
    count = -(-len(tokens) // trie.page_size)
    return trie.attach(parent, encode(tokens), Kind.PROMPT, [list(range(page, page + count))])


@given(TOKENS, TOKENS)
def test_common_tokens(a, b):
    assert common_tokens(encode(a), encode(b)) == lcp(a, b)


@given(st.sets(st.tuples(*[st.integers(0, 2)] * 3), min_size=1), st.lists(st.integers(0, 2), max_size=3))
def test_the_neighbours_hold_the_longest_partial_match(pages, query):
    trie = Trie(4, "m")
    root = trie.root("")
    for index, tokens in enumerate(sorted(pages)):
        attach(trie, root, tokens, index)
    best = max(lcp(query, tokens) for tokens in pages)
    found = trie.sources(root, encode(query))
    assert (found[0].tokens if found else 0) == best
    assert all(lcp(query, [t for t in source.node.data[::4]]) == source.tokens for source in found)


def test_match_walks_runs_and_ends_inside_a_page():
    trie = Trie(2, "m")
    root = trie.root("")
    run = attach(trie, root, [1, 2, 3, 4, 5, 6])
    below = attach(trie, run, [7, 8], 9)
    path, pages, sources = trie.match(root, encode([1, 2, 3, 4, 5, 6, 7, 8, 9]))
    assert (path, pages, sources) == ([root, run, below], 4, [])
    path, pages, sources = trie.match(root, encode([1, 2, 3, 9]))
    assert (path, pages) == ([root, run], 1) and sources == [(run, 1, 1)]
    path, pages, sources = trie.match(root, encode([1, 2, 3]))
    assert (path, pages) == ([root, run], 1) and sources == [(run, 1, 1)]
    path, pages, sources = trie.match(root, encode([1, 9]))
    assert (path, pages) == ([root], 0) and sources == [(run, 0, 1)]
    assert trie.match(root, b"") == ([root], 0, [])


def test_split_keeps_names_and_identity():
    trie = Trie(2, "m")
    root = trie.root("")
    run = attach(trie, root, [1, 2, 3, 4, 5, 6])
    below = attach(trie, run, [7, 8])
    run.refs = 3
    key, digests = run.key, list(run.digests)
    upper = trie.split(run, 1)
    assert upper.key == key and upper.digests + run.digests == digests
    assert (upper.start, upper.end, run.start, run.end) == (0, 2, 2, 6)
    assert (len(upper), len(run), upper.refs, run.refs, upper.hot) == (1, 2, 3, 3, 1)
    assert upper.pages == [[0]] and run.pages == [[1, 2]]
    assert below.parent is run and run.parent is upper and root.children == {encode([1, 2]): upper}
    assert trie.match(root, encode([1, 2, 3, 4, 5, 6, 7, 8])).pages == 4


def test_extend_and_detach():
    trie = Trie(2, "m")
    root = trie.root("")
    a, b = attach(trie, root, [1, 2]), attach(trie, root, [0, 2])
    trie.extend(a, encode([3, 4, 5, 6]), [[7, 8]])
    whole = attach(Trie(2, "m"), Trie(2, "m").root(""), [1, 2, 3, 4, 5, 6])
    assert a.digests == whole.digests and a.pages == [[0, 7, 8]] and a.end == 6
    trie.detach(a)
    assert root.order == [encode([0, 2])] and root.hot == 1 and list(trie.nodes()) == [b]


def test_leaf_is_matched_in_part_only():
    trie = Trie(4, "m")
    root = trie.root("")
    leaf = attach(trie, root, [1, 2])
    assert trie.partial(leaf) and not trie.partial(root)
    for query in ([1, 2], [1, 2, 3, 4, 5]):
        path, pages, sources = trie.match(root, encode(query))
        assert (path, pages, sources) == ([root], 0, [(leaf, 0, 2)])


def test_hbm_source_wins_a_tie():
    trie = Trie(4, "m")
    root = trie.root("")
    low, high = attach(trie, root, [1, 2, 3, 3]), attach(trie, root, [1, 2, 5, 5])
    low.tier = Tier.HOST
    assert [s.node for s in trie.sources(root, encode([1, 2, 4]))] == [high, low]
    high.tier = Tier.HOST
    assert trie.sources(root, encode([1, 2, 4]))[0].node is low


def test_digests_name_model_namespace_and_prefix():
    def key(salt, namespace, tokens):
        trie = Trie(2, salt)
        return attach(trie, trie.root(namespace), tokens).digests[-1]

    names = {key(salt, namespace, tokens) for salt in ("m", "n") for namespace in ("", "a")
             for tokens in ([1, 2], [1, 2, 1, 2], [2, 1])}
    assert len(names) == 12 and all(len(name) == DIGEST_BYTES >= 16 for name in names)


def test_a_root_that_holds_nothing_is_forgotten():
    trie = Trie(2, "m")
    root = trie.root("a")
    node = attach(trie, root, [1, 2])
    trie.prune(root)
    trie.detach(node)
    root.refs = 1
    trie.prune(root)
    assert trie.root("a") is root
    root.refs = 0
    trie.prune(root)
    assert not trie.roots
