"""`oneOf` in JSON schemas, which llguidance follows only where it sees that no two branches hold at once.

It does not look behind references, at numbers, or at what OpenAPI's `discriminator` says. Here a `oneOf` becomes `anyOf`, which
then means the same, where each branch is an object with a tag: a required property with a const or enum that shares no
value with another branch's. A property that `discriminator` names is required by that alone, as in OpenAPI and pydantic.
Whatever else there is stays as it is. Standard library only.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

Schema = dict[str, Any]
MAX_VISITS = 256  # schemas looked at for one oneOf
MAX_TAGS = 16  # properties tried for one
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_ONES = ("items", "additionalProperties")


class _Unknown(Exception):
    """Nothing is proved."""


def with_tagged_unions(schema: Schema) -> Schema:
    """A copy of a schema with `anyOf` for each `oneOf` whose branches tags tell apart."""
    unions = _Unions(schema)
    out = unions.copy(schema)
    if unions.tagged:
        given = out.get("$defs")
        out["$defs"] = (given if isinstance(given, dict) else {}) | unions.tagged
    return out


class _Unions:
    def __init__(self, root: Schema) -> None:
        self.tagged: dict[str, Schema] = {}  # definitions with their tag required, by new name
        self._root = root
        self._names: dict[tuple[str, str], str] = {}  # (reference, tag) -> new name
        self._visits = 0

    def copy(self, schema: Any) -> Any:
        if not isinstance(schema, dict):
            return schema
        out = {key: self._copied(key, value) for key, value in schema.items()}
        tag = None if "anyOf" in schema else self._tag(schema)
        if tag is None:
            return out
        named = _discriminator(schema)
        branches = [self._with_tag(old, new, named) if named else new for old, new in zip(schema["oneOf"], out["oneOf"])]
        return {"anyOf" if key == "oneOf" else key: branches if key == "oneOf" else value
                for key, value in out.items() if key != "discriminator"}

    def _copied(self, key: str, value: Any) -> Any:
        if key in _MAPS and isinstance(value, dict):
            return {name: self.copy(schema) for name, schema in value.items()}
        if key in _LISTS and isinstance(value, list):
            return [self.copy(schema) for schema in value]
        return self.copy(value) if key in _ONES else value

    def _tag(self, schema: Schema) -> str | None:
        """The property that tells the branches of a `oneOf` apart."""
        self._visits = 0
        try:
            found = [self._alternatives(branch, (schema,)) for branch in _branches(schema.get("oneOf"))]
        except _Unknown:
            return None
        named = _discriminator(schema)
        tags = [named] if named else _required(found[0][0])[:MAX_TAGS]
        return next((tag for tag in tags if self._tells(tag, found, named is not None)), None)

    def _tells(self, tag: str, branches: list[list[tuple[Schema, ...]]], named: bool) -> bool:
        count, values = 0, set[Any]()
        for branch in branches:
            own: set[Any] = set()
            for parts in branch:
                mine = self._values(parts, tag)
                if mine is None or not any(part.get("type") == "object" for part in parts) \
                        or not (named or tag in _required(parts)):
                    return False
                own |= mine
            count += len(own)
            values |= own
        return count == len(values)

    def _alternatives(self, schema: Schema, held: tuple[Schema, ...]) -> list[tuple[Schema, ...]]:
        """Ways to meet a schema: each a set of schemas that then hold all."""
        self._visits += 1
        held = (*held, schema)
        if self._visits > MAX_VISITS or len(held) > 16:
            raise _Unknown
        if "$ref" in schema:
            return self._alternatives(self._target(schema["$ref"]), held)
        if (branches := schema.get("oneOf", schema.get("anyOf"))) is None:
            return [held]
        return [parts for branch in _branches(branches) for parts in self._alternatives(branch, held)]

    def _target(self, ref: Any) -> Schema:
        """What a reference within the schema refers to."""
        if not isinstance(ref, str) or not ref.startswith("#/"):
            raise _Unknown
        node: Any = self._root
        for step in ref[2:].split("/"):
            node = node.get(unquote(step).replace("~1", "/").replace("~0", "~")) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise _Unknown
        return node

    def _values(self, parts: tuple[Schema, ...], tag: str) -> set[Any] | None:
        """Of the tag, in an object for which all ``parts`` hold; None if they may be any."""
        found = None
        for part in parts:
            properties = part.get("properties")
            values = self._literals(properties.get(tag)) if isinstance(properties, dict) else None
            found = values if found is None else found if values is None else found & values
        return found

    def _literals(self, schema: Any) -> set[Any] | None:
        for _ in range(16):
            if not isinstance(schema, dict):
                return None
            given = [schema["const"]] if "const" in schema else schema.get("enum")
            if isinstance(given, list):
                simple = all(value is None or isinstance(value, str | bool | int) for value in given)
                return {(type(value), value) for value in given} if simple else None
            try:
                schema = self._target(schema.get("$ref"))
            except _Unknown:
                return None
        return None

    def _with_tag(self, branch: Schema, copied: Schema, tag: str) -> Schema:
        """A branch that requires the tag. A reference goes to a definition of its own: the other uses stay as they are."""
        if tag in (required := _required((branch,))):
            return copied
        if set(branch) != {"$ref"}:
            return copied | {"required": [*required, tag]}
        ref = branch["$ref"]
        target = self._target(ref)
        if tag in (required := _required((target,))):
            return branch
        if (ref, tag) not in self._names:
            name, taken = f"tagged-{len(self._names)}", self._root.get("$defs")
            while isinstance(taken, dict) and name in taken:
                name += "-"
            self._names[ref, tag] = name  # before its definition, which may refer to it
            self.tagged[name] = self.copy(target) | {"required": [*required, tag]}
        return {"$ref": f"#/$defs/{self._names[ref, tag]}"}


def _branches(given: Any) -> list[Schema]:
    if not isinstance(given, list) or not given or not all(isinstance(branch, dict) for branch in given):
        raise _Unknown
    return given


def _required(parts: tuple[Schema, ...]) -> list[str]:
    names = (name for part in parts if isinstance(part.get("required"), list) for name in part["required"])
    return [name for name in names if isinstance(name, str)]


def _discriminator(schema: Schema) -> str | None:
    given = schema.get("discriminator")
    name = given.get("propertyName") if isinstance(given, dict) else None
    return name if isinstance(name, str) else None
