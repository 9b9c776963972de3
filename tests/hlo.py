"""What a compiled program does outside its fusions, read from its text: the arrays it makes and the collectives it runs."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator

_COLLECTIVE = re.compile(r"(all-gather|all-reduce|all-to-all|collective-\w+|reduce-scatter|ragged-all-to-all)(?:-start)?")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%\S+ = (.*?) ([a-z][a-z-]*)\(")
_ARRAY = re.compile(r"[a-z]\w*\[([\d,]*)\](\{\S*?\})?")
# Name what is there already; a -done or -update names what its -start made.
_VIEWS = {"parameter", "get-tuple-element", "bitcast", "tuple", "while", "conditional", "call", "opt-barrier"}
_FETCHES = {"copy-start", "slice-start", "custom-call"}  # the last joins slices
_PLACES = {"copy-start": slice(1), "collective-permute-start": slice(1, 2)}  # of the result among what the type names

Shape = tuple[int, ...]


def instructions(text: str, entry: bool | None = None) -> Iterator[tuple[str, str]]:
    """(opcode, type of the result) of each instruction outside fusions; ``entry``: only of the entry, or only of the rest."""
    fused = {name for line in text.splitlines() if " fusion(" in line for name in re.findall(r" calls=%([^\s,]+)", line)}
    inside, in_entry = False, False
    for line in text.splitlines():
        if computation := _COMPUTATION.match(line):
            inside, in_entry = computation[1] not in fused, line.startswith("ENTRY")
        elif inside and entry in (None, in_entry) and (found := _INSTRUCTION.match(line)):
            yield found[2], found[1]


def given(opcode: str, result: str) -> list[tuple[Shape, bool]]:
    """The arrays that an instruction with a result of this type makes, and whether they lie in a TPU's vector memory."""
    if opcode.endswith("-start") and result.startswith("(("):
        result = result[result.index("), "):]  # what it reads comes first
    arrays = [(tuple(map(int, dims.split(","))) if dims else (), "S(1)" in layout) for dims, layout in _ARRAY.findall(result)]
    return arrays[_PLACES.get(opcode, slice(None))]


def made(text: str, like: Iterable[Shape], *rows: int) -> Counter[tuple[str, Shape]]:
    """How often an instruction makes an array with the elements of one of ``like``, in whatever order and type.

    Not counted: activations of as many elements, known by a dimension in ``rows``; what a TPU fetches into its vector memory.
    """
    like = {tuple(sorted(shape)) for shape in like}
    sizes = set(map(math.prod, like))
    return Counter((opcode, shape) for opcode, result in instructions(text)
                   if opcode not in _VIEWS and not opcode.endswith(("-update", "-done"))
                   for shape, vector_memory in given(opcode, result)
                   if not (vector_memory and opcode in _FETCHES)
                   and (tuple(sorted(shape)) in like or (math.prod(shape) in sizes and not set(rows) & set(shape))))


def collectives(text: str, entry: bool | None = None) -> Counter[tuple[str, Shape]]:
    """How often a collective gives an array of this shape; ``entry`` as in `instructions`."""
    return Counter((found[1], shape) for opcode, result in instructions(text, entry)
                   if (found := _COLLECTIVE.fullmatch(opcode)) for shape, _ in given(opcode, result))
