"""Reads and writes methods: ``name = Optimizer(option=value) + Transform(option=value) + norm=kind + lrs=[...]``.

    method   = [name "="] part {"+" part}
    part     = word ["(" [argument {"," argument}] ")"]  an optimizer or a method of the list; then transforms, groups
             | setting "=" value                         norm=gn(num_groups=8), layers=ws, lrs=[0.1, 0.3], clip_norm=1.0
    argument = option "=" literal | selector             selectors in group(norms, biases, weight_decay=0) alone

Literals are Python's: numbers, texts in quotes, True, False, None, and lists of these; ``0.1x`` is a tenth of what the
option is elsewhere. What the words stand for is not known here.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from wellcond.lab.errors import LabError, one_line, unknown_name

SETTINGS = ("norm", "layers", "lrs", "schedule", "baseline", "create_graph", "clip_norm", "clip_value")
"""What a method says beside its optimizer, transforms and groups."""

_CALLED = ("norm", "layers")  # their values are written as calls
_LONGEST_NAME = 80
_WORD = re.compile(r"[^\s()\[\]{}+,=\"']+")
_QUOTED = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'")
_KEY = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)?)\s*=(?!=)")
_BARE_NAME = re.compile(r"\s*([^\s\"'()=,:\[\]{}](?:[^\"'()=,:\[\]{}]*[^\s\"'()=,:\[\]{}])?)\s*=(?!=)")
_WRITTEN_BARE = re.compile(r"[\w./+-]+(?: [\w./-]+)*")
_TIMES = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)x")


@dataclass(frozen=True)
class Times:
    """A value as a multiple of what the option is elsewhere: ``0.1x``."""

    factor: float


@dataclass(frozen=True)
class Argument:
    """One of a part's arguments; a selector has no key. The position counts characters from 0."""

    key: str | None
    value: object
    position: int


@dataclass(frozen=True)
class Part:
    """One part of a method.

    Attributes:
        word: What it begins with; of a setting, its value's first word, "" where that is a literal.
        position: Where the word stands, in characters from 0.
        arguments: What stands in its parentheses; None if it has none.
        setting: The setting that it is; None for an optimizer, a transform or a group.
        value: A setting's literal.
    """

    word: str
    position: int
    arguments: tuple[Argument, ...] | None = None
    setting: str | None = None
    value: object = None


@dataclass(frozen=True)
class MethodText:
    """A method as it is written.

    Attributes:
        text: All of it.
        name: What stands before its ``=``; None without.
        parts: At least one.
    """

    text: str
    name: str | None
    parts: tuple[Part, ...]

    def error(self, position: int, said: object) -> LabError:
        """Return the error of what stands at a position, for the caller to raise."""
        return LabError(f"method {one_line(self.text)!r}, character {position + 1}: {said}")


def parse(text: str, names: Iterable[str] = ()) -> MethodText:
    """Read a method's parts.

    Args:
        text: The method.
        names: Names with ``+`` or other signs in them that a part may begin with.

    Raises:
        LabError: If the text has another form; the message names what was found, where, and what is allowed.

    >>> formula = parse("mine = AdamW(weight_decay=0.05) + norm=gn(num_groups=8)")
    >>> formula.name, [part.word for part in formula.parts]
    ('mine', ['AdamW', 'gn'])
    """
    return _Reader(text, names).formula()


def write_name(name: str) -> str:
    """Return a method's name as it stands before the ``=``: in quotes where it could be read otherwise."""
    bare = _WRITTEN_BARE.fullmatch(name) and name.rpartition("+")[2] not in SETTINGS
    return name if bare else repr(name)


def write_value(value: object) -> str:
    """Return a literal as it is written.

    >>> write_value((0.9, 0.99)), write_value(Times(0.1)), write_value("gn")
    ('[0.9, 0.99]', '0.1x', "'gn'")
    """
    if isinstance(value, Times):
        return f"{value.factor!r}x"
    if isinstance(value, tuple):
        return f"[{', '.join(write_value(item) for item in value)}]"
    return repr(value)


def write_call(word: str, options: Iterable[tuple[str, object]], selectors: Iterable[str] = ()) -> str:
    """Return a word with its arguments.

    >>> write_call("group", [("weight_decay", 0.0)], ["norms", "head.*"])
    "group(norms, 'head.*', weight_decay=0.0)"
    """
    written = [name if name.isidentifier() else repr(name) for name in selectors]
    return f"{word}({', '.join([*written, *(f'{key}={write_value(value)}' for key, value in options)])})"


def split_list(text: str) -> list[str]:
    """Return the methods of a list: commas in parentheses, brackets and quotes do not part them.

    >>> split_list("SGDM, mine = SGD(momentum=0.9, nesterov=True)")
    ['SGDM', 'mine = SGD(momentum=0.9, nesterov=True)']
    """
    pieces, depth, begun, at = [], 0, 0, 0
    while at < len(text):
        quoted = _QUOTED.match(text, at)
        if quoted:
            at = quoted.end()
            continue
        depth += (text[at] in "([{") - (text[at] in ")]}")
        if text[at] == "," and depth == 0:
            pieces.append(text[begun:at])
            begun = at + 1
        at += 1
    return [piece.strip() for piece in [*pieces, text[begun:]] if piece.strip()]


class _Reader:
    """Reads a text from left to right."""

    def __init__(self, text: str, names: Iterable[str]) -> None:
        self.text, self.at = text, 0
        self.names = sorted((name for name in names if not _WORD.fullmatch(name)), key=len, reverse=True)

    def formula(self) -> MethodText:
        name = self._name()
        parts = [self._part()]
        while self._next():
            if self.text[self.at] != "+":
                raise self._unexpected("'+' and another part, or the end", "the parts of a method are joined by '+'")
            self.at += 1
            parts.append(self._part())
        return MethodText(self.text, name, tuple(parts))

    def _name(self) -> str | None:
        self._skip()
        quoted = _QUOTED.match(self.text, self.at)
        if quoted:
            after = re.compile(r"\s*=").match(self.text, quoted.end())
            if after is None:
                self.at = quoted.end()
                raise self._unexpected("'=' after the name in quotes")
            name, end = str(self._evaluated(quoted[0], self.at)), after.end()
        else:
            bare = _BARE_NAME.match(self.text, self.at)
            if bare is None or " +" in bare[1] or "+ " in bare[1] or bare[1].rpartition("+")[2].strip() in SETTINGS:
                return None
            name, end = bare[1], bare.end()
        if not name.strip() or not name.isprintable() or len(name) > _LONGEST_NAME:
            raise self._error(self.at, f"a name must have 1 to {_LONGEST_NAME} printable characters, got {name!r}")
        self.at = end
        return name

    def _part(self) -> Part:
        if not self._next():
            raise self._unexpected("an optimizer, a transform or a setting")
        setting = _KEY.match(self.text, self.at)
        if setting is None:
            word, at = self._word("an optimizer, a transform or a setting")
            return Part(word, at, self._arguments(selectors=word == "group"))
        at = self.at
        if setting[1] not in SETTINGS:
            raise self._error(at, unknown_name("setting", setting[1], SETTINGS))
        self.at = setting.end()
        self._skip()
        if setting[1] in _CALLED:
            word, place = self._word(f"what {setting[1]} is to be, such as {setting[1]}=gn")
            return Part(word, place, self._arguments(selectors=False), setting[1])
        if setting[1] == "baseline":
            return Part("", self.at, None, setting[1], self._baseline())
        place = self.at
        return Part("", place, None, setting[1], self._literal())

    def _baseline(self) -> str:
        quoted = _QUOTED.match(self.text, self.at)
        if quoted:
            self.at = quoted.end()
            return str(self._evaluated(quoted[0], quoted.start()))
        # Names may have spaces and +, but only parts are joined by a + with a space before it.
        end = re.compile(r"\s+\+|$").search(self.text, self.at)
        assert end is not None
        name = self.text[self.at : end.start()].strip()
        if not name:
            raise self._unexpected("a method's name")
        self.at = end.start()
        return name

    def _word(self, expected: str) -> tuple[str, int]:
        at = self.at
        for name in self.names:
            end = at + len(name)
            if self.text.startswith(name, at) and (end == len(self.text) or self.text[end] in " \t\n(+"):
                self.at = end
                return name, at
        found = _WORD.match(self.text, at)
        if found is None:
            raise self._unexpected(expected)
        self.at = found.end()
        return found[0], at

    def _arguments(self, selectors: bool) -> tuple[Argument, ...] | None:
        if not self._next() or self.text[self.at] != "(":
            return None
        self.at += 1
        found: list[Argument] = []
        while self._next() and self.text[self.at] != ")":
            found.append(self._argument(selectors))
            keys = [argument.key for argument in found if argument.key is not None]
            if len(keys) != len(set(keys)):
                raise self._error(found[-1].position, f"{found[-1].key} is given twice")
            if self._next() and self.text[self.at] == ",":
                self.at += 1
            elif not self._next() or self.text[self.at] != ")":
                raise self._unexpected("',' or ')'")
        if self.at >= len(self.text):
            raise self._unexpected("')'")
        self.at += 1
        return tuple(found)

    def _argument(self, selectors: bool) -> Argument:
        at = self.at
        key = _KEY.match(self.text, at)
        if key is not None:
            self.at = key.end()
            return Argument(key[1], self._literal(), at)
        if not selectors:
            raise self._unexpected("OPTION=VALUE")
        quoted = _QUOTED.match(self.text, at)
        if quoted:
            self.at = quoted.end()
            return Argument(None, self._evaluated(quoted[0], at), at)
        return Argument(None, self._word("a selector such as norms, or OPTION=VALUE")[0], at)

    def _literal(self) -> object:
        self._skip()
        begun = self.at
        self.at = self._end_of_literal()
        written = self.text[begun : self.at].strip()
        if not written:
            raise self._unexpected("a value")
        times = _TIMES.fullmatch(written)
        if times and math.isfinite(float(times[1])):
            return Times(float(times[1]))
        return self._evaluated(written, begun)

    def _end_of_literal(self) -> int:
        at, depth = self.at, 0
        while at < len(self.text):
            quoted = _QUOTED.match(self.text, at)
            if quoted:
                at = quoted.end()
                continue
            char = self.text[at]
            if depth == 0 and (char in "),]}" or (char == "+" and self._joins(at))):
                break
            depth += (char in "([{") - (char in ")]}")
            at += 1
        return at

    def _joins(self, at: int) -> bool:
        """Whether a + joins parts: it is neither a sign nor within a number such as 1e+3."""
        before = self.text[self.at : at]
        return bool(before.strip()) and not re.search(r"\d\.?[eE]$", before)

    def _evaluated(self, written: str, at: int) -> object:
        try:
            value = frozen(ast.literal_eval(written))
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            texts = f"; a text stands in quotes: {written!r}" if written.isidentifier() else ""
            rule = "a value must be a number, a text in quotes, True, False, None or a list of these"
            raise self._error(at, f"{rule}, got {written}{texts}") from None
        return value

    def _next(self) -> bool:
        """Go to the next sign that is no space; return whether there is any."""
        self._skip()
        return self.at < len(self.text)

    def _skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def _unexpected(self, expected: str, why: str = "") -> LabError:
        found = _WORD.match(self.text, self.at)
        got = "the end" if self.at >= len(self.text) else repr(found[0] if found else self.text[self.at])
        return self._error(self.at, f"expected {expected}, got {got}{f': {why}' if why else ''}")

    def _error(self, at: int, said: object) -> LabError:
        return MethodText(self.text, None, ()).error(at, said)


def frozen(value: object) -> object:
    """Return a value with lists as tuples: methods are compared and looked up.

    Raises:
        ValueError: If it is none that can be written again.
    """
    if isinstance(value, (list, tuple)):
        return tuple(frozen(item) for item in value)
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(value)
