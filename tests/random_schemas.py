"""Random JSON schemas of which every text is bounded, for tests of structured output."""

import json
import random
from typing import Any

type Schema = dict[str, Any]

_WORDS = ("name", "age", "city", "tags", "ok", "kind", "note", "x", "é", "two words")


def random_schemas(seed: int, number: int, longest: int, depth: int = 3) -> list[Schema]:
    """Objects, arrays, alternatives and scalars, nested; every other one is an object.

    Args:
      seed: same seed, same schemas.
      number: of schemas.
      longest: bytes that no valid text without white space exceeds, however it is written.
      depth: of nesting, at most.
    """
    rng, schemas = random.Random(seed), []
    while len(schemas) < number:
        schema = (_object if len(schemas) % 2 else _any)(rng, depth)
        if longest_text(schema) <= longest:
            schemas.append(schema)
    return schemas


def longest_text(schema: Schema) -> int:
    """Bytes of the longest text that a schema of `random_schemas` allows."""
    if "enum" in schema:
        return max(_escaped(value) for value in schema["enum"])
    if "const" in schema:
        return _escaped(schema["const"])
    if "anyOf" in schema:
        return max(map(longest_text, schema["anyOf"]))
    match schema["type"]:
        case "object":
            return 2 + sum(_escaped(name) + 2 + longest_text(value) for name, value in schema["properties"].items())
        case "array":
            return 2 + schema["maxItems"] * (1 + longest_text(schema["items"]))
        case "string":
            return 2 + 6 * schema["maxLength"]  # each character may be escaped
        case "integer":
            return max(len(str(schema["minimum"])), len(str(schema["maximum"])))
        case _:
            return 5  # null, true, false


def _escaped(value: Any) -> int:
    return 6 * len(json.dumps(value, ensure_ascii=False))


def _any(rng: random.Random, depth: int) -> Schema:
    kinds = [_string, _integer, _enum, _const, _plain]
    if depth:
        kinds += [_object, _object, _array, _alternatives]
    return rng.choice(kinds)(rng, depth - 1)


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(_WORDS, rng.randint(0, 4))
    return {
        "type": "object",
        "properties": {name: _any(rng, depth) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
        "additionalProperties": False,
    }


def _array(rng: random.Random, depth: int) -> Schema:
    low = rng.randint(0, 2)
    return {"type": "array", "items": _any(rng, depth), "minItems": low, "maxItems": low + rng.randint(0, 2)}


def _alternatives(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(rng, depth) for _ in range(rng.randint(1, 3))]}


def _string(rng: random.Random, depth: int) -> Schema:
    low = rng.randint(0, 4)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 8)}


def _integer(rng: random.Random, depth: int) -> Schema:
    low = rng.randint(-1000, 1000)
    return {"type": "integer", "minimum": low, "maximum": low + rng.choice([0, 1, 9, 100, 12345])}


def _enum(rng: random.Random, depth: int) -> Schema:
    return {"enum": rng.sample([*_WORDS, None, True, 0, -1.5, [], [1, "a"], {"k": None}], rng.randint(1, 5))}


def _const(rng: random.Random, depth: int) -> Schema:
    return {"const": rng.choice([*_WORDS, 17, 'say "hi"\n', {"a": [1]}])}


def _plain(rng: random.Random, depth: int) -> Schema:
    return {"type": rng.choice(["null", "boolean"])}
