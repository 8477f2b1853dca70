"""A matcher for the tests: it decides as EventBridge does on events, and as CodePipeline does on the files of a push.

EventBridge, by its guide: every field of the pattern must match. A field matches when one value of its list does. A
list in the event matches when one of its items does. Text and numbers are compared as they are written, so that `300`
is not `300.0`. moto's matcher decides otherwise in six of the cases of `test_rules.py`, which is why there is one here.
"""
import re
from collections.abc import Iterator
from typing import Any

from intel_nb.storage import InputError

LARGEST = 5_000_000_000  # EventBridge compares no number beyond it


def matches(pattern: dict, event: dict) -> bool:
    "Return whether EventBridge would match `event`; raise `InputError` for a pattern that it refuses."
    return all(matches_any(inner, event) if name == "$or" else field_matches(inner, event.get(name, ()))
               for name, inner in pattern.items())


def matches_any(patterns: list[dict], event: dict) -> bool:
    "Return whether `event` matches one of `patterns`. All are tried, so that a refused one is found."
    decisions = [matches(pattern, event) for pattern in patterns]
    return any(decisions)


def field_matches(tests: dict | list, value: Any) -> bool:
    """Return whether the field `value` of an event passes.

    A path that is missing counts as an empty list, also where the event has a plain value in the middle of the path.
    In a list of objects, one of them must match as a whole."""
    if isinstance(tests, dict):
        objects = [item for item in items(value) if isinstance(item, dict)]
        return any(matches(tests, item) for item in objects or [{}])
    if not isinstance(tests, list) or not tests:
        raise InputError(f"EventBridge refuses {tests!r} in a pattern; it takes a list of values, as in {[tests]}")
    leaves = [item for item in items(value) if not isinstance(item, dict)]
    decisions = [value_matches(test, leaves) for test in tests]
    return any(decisions)


def items(value: Any) -> Iterator[Any]:
    "Yield `value`, or the items of the lists in it."
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from items(item)
    else:
        yield value


def value_matches(test: Any, leaves: list) -> bool:
    "Return whether one of `leaves` passes `test`: a plain value, or an object with one filter."
    if not isinstance(test, dict):
        return any(is_same(test, leaf) for leaf in leaves)
    (kind, argument), *more = test.items()
    if more or kind not in {"exists", *FILTERS}:
        kinds = ", ".join(map(repr, test))
        raise InputError(f"EventBridge knows no filter {kinds}; there are exists, {', '.join(FILTERS)}")
    if kind == "exists":
        return bool(leaves) == argument
    decisions = [FILTERS[kind](argument, leaf) for leaf in leaves]
    return any(decisions)


def is_same(one: Any, other: Any) -> bool:
    "Return whether two values are written alike: `1` is neither `1.0` nor `true`."
    return type(one) is type(other) and one == other


# The filters. Those of text take text only, and `numeric` takes numbers only.

def has_prefix(argument: Any, value: Any) -> bool:
    if isinstance(argument, dict):
        return isinstance(value, str) and value.lower().startswith(argument["equals-ignore-case"].lower())
    return isinstance(value, str) and value.startswith(argument)


def has_suffix(argument: Any, value: Any) -> bool:
    if isinstance(argument, dict):
        return isinstance(value, str) and value.lower().endswith(argument["equals-ignore-case"].lower())
    return isinstance(value, str) and value.endswith(argument)


def equals_ignoring_case(argument: Any, value: Any) -> bool:
    return isinstance(value, str) and value.lower() in [text.lower() for text in items(argument)]


def fits_wildcard(argument: Any, value: Any) -> bool:
    if "**" in argument:
        raise InputError(f"EventBridge refuses the wildcard {argument!r}; one * stands for any number of characters")
    pieces = re.findall(r"\\[\\*]|\*|[^\\*]+", argument)
    regex = "".join(".*" if p == "*" else re.escape(p[1:] if p in (r"\*", r"\\") else p) for p in pieces)
    return isinstance(value, str) and re.fullmatch(regex, value, re.DOTALL) is not None


COMPARE = {"=": lambda a, b: a == b, "<": lambda a, b: a < b, "<=": lambda a, b: a <= b,
           ">": lambda a, b: a > b, ">=": lambda a, b: a >= b}


def is_in_range(argument: list, value: Any) -> bool:
    pairs = list(zip(argument[::2], argument[1::2]))
    if len(argument) % 2 or not pairs or any(sign not in COMPARE for sign, _ in pairs):
        raise InputError(f"EventBridge refuses numeric {argument!r}; "
                         "it takes signs and numbers, as in ['>', 0, '<=', 5]")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST
    return is_number and all(COMPARE[sign](value, bound) for sign, bound in pairs)


def is_anything_but(argument: Any, value: Any) -> bool:
    "Return whether `value` is none of `argument`: a value, a list of values, or a filter."
    if isinstance(argument, dict):
        (kind, inner), = argument.items()
        return not any(FILTERS[kind](one, value) for one in items(inner))
    return not any(is_same(one, value) for one in items(argument))


FILTERS = {"prefix": has_prefix, "suffix": has_suffix, "equals-ignore-case": equals_ignoring_case,
           "wildcard": fits_wildcard, "numeric": is_in_range, "anything-but": is_anything_but}


# The files of a push, by CodePipeline's guide ("Working with glob patterns in syntax").

GLOB = {"**": ".*", "*": "[^/]*", "?": "[^/]", "{": "(?:", ",": "|", "}": ")"}


def glob_regex(pattern: str) -> str:
    "Return a regular expression for one of CodePipeline's glob patterns."
    pieces = re.findall(r"\*\*|\[[^\]]+\]|.", pattern)
    return "".join(piece if piece.startswith("[") else GLOB.get(piece, re.escape(piece)) for piece in pieces)


def is_pushed(paths: tuple[str, ...], changed: list[str]) -> bool:
    "Return whether a push that changed these files starts a pipeline whose trigger includes `paths`."
    return any(re.fullmatch(glob_regex(path), name) for path in paths for name in changed)
