"""How much to grow: ``x2``, ``x1.5``, ``+4`` or an absolute number."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from growkit.core.errors import UsageError


@dataclass(frozen=True)
class Amount:
    """A size request: a factor, an increment or an absolute size."""

    text: str
    factor: Fraction | None = None
    increment: int | None = None
    absolute: int | None = None

    @staticmethod
    def parse(text: str | int, option: str) -> Amount:
        """Read ``x2``, ``x1.5``, ``+4`` or ``48``. Raises UsageError naming ``option``."""
        word = str(text).strip().lower()
        if match := re.fullmatch(r"x(\d+(?:\.\d+)?|\d+/\d+)", word):
            if "/" in match[1] and not int(match[1].split("/")[1]):
                raise _malformed(text, option)
            factor = Fraction(match[1])
            if factor < 1:
                raise UsageError(
                    f"{option} {text} is smaller than x1.", "growkit grows; use a factor above 1."
                )
            return Amount(word, factor=factor)
        if match := re.fullmatch(r"\+(\d+)", word):
            return Amount(word, increment=int(match[1]))
        if match := re.fullmatch(r"\d+", word):
            return Amount(word, absolute=int(word))
        raise _malformed(text, option)

    def exact(self, size: int) -> Fraction:
        """The requested size, not rounded."""
        if self.factor is not None:
            return self.factor * size
        if self.increment is not None:
            return Fraction(size + self.increment)
        assert self.absolute is not None
        return Fraction(self.absolute)

    def resolve(self, size: int, option: str, unit: str, multiple: int = 1) -> int:
        """The new size: a whole number, at least ``size`` and a multiple of ``multiple``.

        Raises:
            UsageError: with the numbers that are possible.
        """
        target = self.exact(size)
        if target < size:
            raise UsageError(
                f"{option} {self.text} asks for {float(target):g} {unit}, fewer than the {size} "
                "there are.",
                f"growkit grows; ask for more than {size}.",
            )
        if target.denominator != 1 or target % multiple:
            first = (size // multiple + 1) * multiple
            possible = [first + i * multiple for i in range(4)]
            choices = ", ".join(f"{n} (x{n / size:.4g})" for n in possible)
            why = f"has to be a multiple of {multiple}" if multiple > 1 else "has to be whole"
            raise UsageError(
                f"{option} {self.text} asks for {float(target):g} {unit} from {size}, and the "
                f"number {why}.",
                f"Possible: {choices} ...",
            )
        return int(target)


def _malformed(text: str | int, option: str) -> UsageError:
    return UsageError(
        f"{option} {text!r} is not a size.",
        "Write a factor (x2, x1.5), an increment (+4) or the new number (48).",
    )
