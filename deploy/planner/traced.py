"""Numbers that remember how they came about. The expression that is shown is the one that was computed.

memory = given("visible memory", 81050 * MIB, "B", "nvidia-smi")
room = (memory * 0.9 - weights).named("KV room", "B")
for step in room.working(): ...        every number below it, inputs first, each once
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SUM, PRODUCT, ATOM = 0, 1, 2  # how tightly an expression binds, for brackets


@dataclass(frozen=True, slots=True, eq=False)
class Traced:
    """A number. `text`: how it stands in other numbers' formulas; `figures`: the same with values in place of names.
    `name`, `unit`, `source` and `formula` are set where it has a name: either it was given (source), or it was
    computed (formula, from `parts`)."""

    value: float
    text: str
    figures: str
    binding: int = ATOM
    parts: tuple[Traced, ...] = ()
    name: str = ""
    unit: str = ""
    source: str = ""
    formula: str = ""
    filled: str = ""  # the formula with its inputs' values

    def named(self, name: str, unit: str = "") -> Traced:
        """The same number under a name of its own; formulas above it speak of the name."""
        shown = _number(self.value)
        return Traced(
            self.value,
            name,
            shown,
            parts=self.parts,
            name=name,
            unit=unit,
            formula=self.text,
            filled=self.figures,
        )

    def working(self) -> Iterator[Traced]:
        """The named numbers that this one is made of, inputs first, itself last, each name once."""
        seen: set[str] = set()

        def walk(number: Traced) -> Iterator[Traced]:
            for part in number.parts:
                yield from walk(part)
            if number.name and number.name not in seen:
                seen.add(number.name)
                yield number

        yield from walk(self)

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        if self.source:
            return f"{self.name} = {_number(self.value)}{unit} ({self.source})"
        return f"{self.name} = {self.formula} = {self.filled} = {_number(self.value)}{unit}"

    def __float__(self) -> float:
        return self.value

    def __add__(self, other: Traced | float) -> Traced:
        return _joined(self, "+", other, lambda a, b: a + b, SUM)

    def __sub__(self, other: Traced | float) -> Traced:
        return _joined(self, "−", other, lambda a, b: a - b, SUM)

    def __mul__(self, other: Traced | float) -> Traced:
        return _joined(self, "×", other, lambda a, b: a * b, PRODUCT)

    def __truediv__(self, other: Traced | float) -> Traced:
        return _joined(self, "/", other, lambda a, b: a / b, PRODUCT)


def given(name: str, value: float, unit: str = "", source: str = "given") -> Traced:
    """An input, and where it comes from."""
    return Traced(value, name, _number(value), name=name, unit=unit, source=source)


def number(value: float) -> Traced:
    """A constant of a formula, such as the 2 of keys and values."""
    return Traced(value, _number(value), _number(value))


def larger(one: Traced, other: Traced | float) -> Traced:
    return _called("max", max, one, other)


def smaller(one: Traced, other: Traced | float) -> Traced:
    return _called("min", min, one, other)


def ceiling(one: Traced) -> Traced:
    return Traced(math.ceil(one.value - 1e-9), f"⌈{one.text}⌉", f"⌈{one.figures}⌉", parts=_kept(one))


def floor(one: Traced) -> Traced:
    return Traced(math.floor(one.value + 1e-9), f"⌊{one.text}⌋", f"⌊{one.figures}⌋", parts=_kept(one))


def _called(word: str, function: Callable[[float, float], float], one: Traced, other: Traced | float) -> Traced:
    second = other if isinstance(other, Traced) else number(other)
    return Traced(
        function(one.value, second.value),
        f"{word}({one.text}, {second.text})",
        f"{word}({one.figures}, {second.figures})",
        parts=_kept(one) + _kept(second),
    )


def _joined(
    one: Traced, sign: str, other: Traced | float, function: Callable[[float, float], float], binding: int
) -> Traced:
    second = other if isinstance(other, Traced) else number(other)
    # a − (b + c) and a / (b × c) keep their brackets; a + (b + c) and a × (b × c) need none.
    tight = binding + 1 if sign in "−/" else binding
    texts = [_bracketed(one.text, one.binding < binding), _bracketed(second.text, second.binding < tight)]
    figures = [_bracketed(one.figures, one.binding < binding), _bracketed(second.figures, second.binding < tight)]
    return Traced(
        function(one.value, second.value),
        f" {sign} ".join(texts),
        f" {sign} ".join(figures),
        binding,
        _kept(one) + _kept(second),
    )


def _bracketed(text: str, needed: bool) -> str:
    return f"({text})" if needed else text


def _kept(one: Traced) -> tuple[Traced, ...]:
    return (one,) if one.name else one.parts


def _number(value: float) -> str:
    """1,234,567; 12.3; 0.0123; 1.45e+11."""
    if value and (abs(value) >= 1e10 or abs(value) < 1e-3):
        return f"{value:.4g}"
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.4g}"
