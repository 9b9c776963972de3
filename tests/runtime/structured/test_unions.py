"""oneOf told apart by tags: what the grammar takes is what the schema takes, and what cannot be proved is refused."""

import enum
import json
import time
import typing

import jsonschema
import llguidance
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxkv.params import Structured
from jaxkv.runtime.structured.grammar import ONE_OF, grammar_of, make_matcher
from jaxkv.runtime.structured.unions import with_tagged_unions
from jaxkv.runtime.tokenizer import load_tokenizer
from tests.text_models import write_byte_level

A, B = ({"type": "object", "properties": {"k": {"const": k}, "x": {"type": "integer"}}, "required": ["k"],
         "additionalProperties": False} for k in "ab")
DEFS = {"$defs": {"A": A, "B": B}}
REFS = [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}]


class Colour(enum.IntEnum):
    RED = 1
    BLUE = 2


class Leaf(pydantic.BaseModel):
    op: typing.Literal["leaf"]
    value: int


class Node(pydantic.BaseModel):
    op: typing.Literal["add", "mul"]
    args: list[typing.Annotated[typing.Union[Leaf, "Node"], pydantic.Field(discriminator="op")]]


class Free(pydantic.BaseModel):
    kind: typing.Literal["free"] = "free"
    next: typing.Annotated[typing.Union["Free", "Bound"], pydantic.Field(discriminator="kind")] | None = None


class Bound(pydantic.BaseModel):
    kind: typing.Literal["bound"] = "bound"


class Red(pydantic.BaseModel):
    kind: typing.Literal["paint"]
    colour: typing.Literal[Colour.RED]


class Blue(pydantic.BaseModel):
    kind: typing.Literal["paint"]
    colour: typing.Literal[Colour.BLUE]


Paint = typing.Annotated[Red | Blue, pydantic.Field(discriminator="colour")]
Thing = typing.Annotated[Paint | Bound, pydantic.Field(discriminator="kind")]


@pytest.fixture(scope="module")
def takes(tmp_path_factory):
    """Whether the grammar of a schema takes a JSON text; ValueError if there is no grammar."""
    tokenizer = load_tokenizer(write_byte_level(tmp_path_factory.mktemp("byte_level")))
    known = llguidance.LLTokenizer(tokenizer.to_json(), eos_token=2)

    def take(schema, text):
        matcher = make_matcher(known, grammar_of(Structured("json_schema", json.dumps(schema))))
        ids = tokenizer.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return take


@pytest.mark.parametrize(("kind", "texts"), [
    (Node, ['{"op": "add", "args": [{"op": "leaf", "value": 1}, {"op": "mul", "args": []}]}', '{"op": "leaf", "args": []}',
            '{"op": "add", "args": [{"op": "leaf", "args": []}]}', '{"op": "add", "args": [{"value": 1}]}']),
    (Free, ['{"kind": "free", "next": {"kind": "free", "next": {"kind": "bound"}}}', '{"kind": "free", "next": null}',
            '{"kind": "free", "next": {"next": null}}', '{"kind": "free", "next": {}}']),
    (Thing, ['{"kind": "paint", "colour": 1}', '{"kind": "paint", "colour": 2}', '{"kind": "bound"}', '{"kind": "paint"}',
             '{"kind": "paint", "colour": 3}', '{"colour": 1}']),
    (list[Paint], ['[{"kind": "paint", "colour": 1}, {"kind": "paint", "colour": 2}]', '[{"colour": 2}]', "[]"]),
    (Paint | None, ['{"kind": "paint", "colour": 2}', "null", "{}"]),
], ids=["recursive", "tags with defaults", "nested", "list", "optional"])
def test_discriminated_unions_of_pydantic(takes, kind, texts):
    adapter = pydantic.TypeAdapter(kind)

    def valid(text):
        try:
            adapter.validate_json(text)
        except pydantic.ValidationError:
            return False
        return True

    found = [takes(adapter.json_schema(), text) for text in texts]
    assert found == [valid(text) for text in texts] and {True, False} == set(found)


@pytest.mark.parametrize("schema", [
    {**DEFS, "oneOf": REFS}, {**DEFS, "type": "array", "items": {"oneOf": REFS}}, {"oneOf": [A, B]},
    {**DEFS, "oneOf": [{"oneOf": [REFS[0]]}, {"anyOf": [REFS[1]]}]},
    {"type": "object", "oneOf": [{"properties": {"k": {"enum": ["a", 1]}}, "required": ["k"]},
                                 {"properties": {"k": {"const": "b"}}, "required": ["k"]}]},
    {"properties": {"oneOf": {"oneOf": REFS}}, "type": "object", "required": ["oneOf"], **DEFS},
    {"oneOf": [{"type": "null"}, A]},
    {"type": "array", "prefixItems": [{"oneOf": REFS}, {"$ref": "#/prefixItems/0/oneOf/1"}], "minItems": 1, **DEFS},
], ids=str)
def test_the_grammar_is_the_schema(takes, schema):
    items = [*({"k": k} for k in ("a", "b", "c", 1)), {}, None, "a", {"x": 1}, {"k": "a", "x": 1}]
    validator, found = jsonschema.Draft202012Validator(schema), []
    for value in [*items, *([item] for item in items), *([{"k": "a"}, item] for item in items),
                  *({"oneOf": item} for item in items)]:
        found.append(validator.is_valid(value))
        assert takes(schema, json.dumps(value)) == found[-1], value
    assert {True, False} == set(found)


@pytest.mark.parametrize("schema", [
    {"oneOf": [*REFS, REFS[0]]}, {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    {"oneOf": [REFS[0], {"type": "object", "properties": {"k": {"type": "string"}}, "required": ["k"]}]},
    {"oneOf": [{k: v for k, v in one.items() if k != "required"} for one in (A, B)]},
    {"oneOf": [{k: v for k, v in one.items() if k != "type"} for one in (A, B)]},
    {"oneOf": [A, {**B, "properties": {"k": {"const": 1.0}}}, {**B, "properties": {"k": {"const": 1}}}]},
    {"oneOf": [{"$ref": "#/$defs/R"}, REFS[0]]}, {"oneOf": [{"$ref": "#/$defs/Many"}, REFS[0]]},
], ids=str)
def test_what_is_not_proved_is_refused(takes, schema):
    recursive = {"anyOf": [{"$ref": "#/$defs/R"}, {"$ref": "#/$defs/R"}]}
    many = {"Many": {"anyOf": [{"$ref": "#/$defs/Ms"}] * 40}, "Ms": {"anyOf": [{"$ref": "#/$defs/M"}] * 40},
            "M": {"anyOf": [REFS[1]] * 40}}
    with pytest.raises(ValueError) as refusal:
        takes(schema | {"$defs": {**DEFS["$defs"], "R": recursive, **many}}, "{}")
    assert str(refusal.value) == ONE_OF


TAGS = st.sampled_from([{"const": "a"}, {"const": "b"}, {"enum": ["a", 1]}, {"const": 1}, {"const": True}, {"type": "string"}])
OBJECTS = st.fixed_dictionaries({"type": st.sampled_from(["object"] * 4 + ["string"])}, optional={
    "properties": st.fixed_dictionaries({"k": TAGS}, optional={"m": TAGS}), "$ref": st.just("#/$defs/A"),
    "required": st.sampled_from([["k"], ["m", "k"], []])})
LEAVES = OBJECTS | st.sampled_from([{"$ref": f"#/$defs/{name}"} for name in "ABC"])
PAIRS = st.lists(LEAVES, min_size=1, max_size=2)
UNIONS = st.fixed_dictionaries({"anyOf": PAIRS}) | st.fixed_dictionaries({"oneOf": PAIRS})
VALUES = ["a", 1, None, {}, *({name: value} for name in "km" for value in ("a", "b", 1, True)),
          *({"k": k, "m": m} for k in ("a", "b", 1) for m in ("a", 1, True))]


@given(st.lists(LEAVES | UNIONS, min_size=1, max_size=3), OBJECTS, st.sampled_from([None, None, "k", "m"]))
def test_no_rewriting_takes_more_than_was_asked_for(branches, definition, named):
    schema = {"$defs": {**DEFS["$defs"], "C": definition}, "oneOf": branches}
    schema |= {"discriminator": {"propertyName": named}} if named else {}
    before, after = (jsonschema.Draft202012Validator(one) for one in (schema, with_tagged_unions(schema)))
    for value in VALUES:
        valid = before.is_valid(value)
        assert after.is_valid(value) == valid or valid and named and named not in value


def test_the_rest_stays_as_it_is():
    for schema in ({"const": {"oneOf": [A, B]}}, {"properties": {"required": {"enum": [1]}}, "required": 5}, {"oneOf": 5},
                   {"oneOf": [5]}, {"oneOf": [], "discriminator": {"propertyName": "k"}}, {"$ref": "#/a"},
                   {"oneOf": [{**A, "required": 5}, {"$ref": "#/nowhere"}], "discriminator": {"propertyName": "k"}}):
        assert with_tagged_unions(schema) == schema
    schema = {**DEFS, "title": "t", "oneOf": REFS, "discriminator": {"propertyName": "k"}, "description": "d"}
    assert list(with_tagged_unions(schema).items()) == [*DEFS.items(), ("title", "t"), ("anyOf", REFS), ("description", "d")]
    untagged = {"type": "object", "properties": {"k": {"const": "c"}}}
    taken = {"$defs": {"C": untagged, "A": A, "tagged-0": {}}, "oneOf": [{"$ref": "#/$defs/C"}, REFS[0]],
             "discriminator": {"propertyName": "k"}}
    assert with_tagged_unions(taken) == {
        "$defs": {**taken["$defs"], "tagged-0-": {**untagged, "required": ["k"]}},
        "anyOf": [{"$ref": "#/$defs/tagged-0-"}, REFS[0]]}


def test_proofs_have_a_bound_together():
    tags = "abcdefghijklmnop"
    all_tags = {"type": "object", "properties": {tag: {"const": 0} for tag in tags}, "required": list(tags)}
    schema = {"$defs": {"E": all_tags, "D": {"anyOf": [{"$ref": "#/$defs/E"}] * 100}},
              "properties": {str(i): {"oneOf": [{"$ref": "#/$defs/D"}, {}]} for i in range(1300)}}
    start = time.process_time()
    assert with_tagged_unions(schema) == schema
    assert time.process_time() - start < 1  # each on its own: six seconds
