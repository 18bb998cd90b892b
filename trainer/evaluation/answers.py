"""Whether a reply gives the reference answer: a number, one of several choices, or words."""

import re
import unicodedata
from decimal import Decimal
from typing import NamedTuple

_CURRENCY = r"[$\u20ac\u00a3\u00a5\u20b9]"
# Thousands by comma, apostrophe or a narrow space; a sign only where nothing stands before it that it subtracts from.
_NUMBER = (
    rf"(?:(?<![\w)])[-\u2212])?(?:{_CURRENCY} ?)?"
    r"(?:\d{1,3}(?:[,'\u2019\u00a0\u202f]\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?!\w))?"
)
_UNITS = {
    "$": "dollar dollars usd", "%": "percent pct", "\u20ac": "euro euros eur", "\u00a3": "gbp sterling",
    "cent": "cents", "km": "kilometer kilometers kilometre kilometres", "m": "meter meters metre metres",
    "cm": "centimeter centimeters centimetre centimetres", "mm": "millimeter millimeters millimetre millimetres",
    "mile": "miles mi", "foot": "feet ft", "inch": "inches", "yard": "yards yd", "kg": "kilogram kilograms kilos",
    "g": "gram grams", "lb": "lbs", "oz": "ounce ounces", "l": "liter liters litre litres", "ml": "milliliters",
    "second": "seconds sec s", "minute": "minutes min", "hour": "hours h hr hrs", "day": "days", "week": "weeks",
    "month": "months", "year": "years", "mph": "", "degree": "degrees \u00b0",
}  # fmt: skip
_UNIT = {name: unit for unit, names in _UNITS.items() for name in (unit, *names.split())}
_QUANTITY = re.compile(rf"(?P<number>{_NUMBER}) ?(?P<unit>%|\u20ac|\u00b0|[a-z]+\b)?", re.IGNORECASE)
_NAMED_CHOICE = re.compile(
    r"\b(?:answer|choice|option)\b\W*(?:(?:is|would be|must be)\b\W*)?(?:(?:option|choice)\b\W*)?"
    r"(?:([A-Z])\b(?!')|([a-z])(?=[).]|\W*$))"
)
_OPENING_CHOICE = re.compile(r"^\W*(?:([A-Z])\b(?!')|([a-z])(?=[).:]|\W*$))")


class _Quantity(NamedTuple):
    value: Decimal
    unit: str | None


def reference(answer: str) -> str:
    """What a reply is compared with: the answer, or what stands after `####` in its last line.

    GSM8K is published so: the rationale, and the number after `####`.
    """
    last = answer.strip().rsplit("\n", 1)[-1]
    return (last.rsplit("####", 1)[1] if "####" in last else answer).strip()


def matches(text: str, answer: str) -> bool:
    """Whether a reply gives the reference answer (`reference`).

    A number must be the last number of the reply, equal in value ("1,200" = "$1200.0"), as GSM8K is commonly scored;
    where the answer has a unit ("5 km", "72%"), the reply may leave it out but not name another. A single capital
    letter must be the choice that the reply names last ("the answer is B", "option B") or else opens with. Any other
    answer must occur in the reply as whole words after normalisation (case, punctuation, articles, Unicode form):
    chat models wrap a correct answer in a sentence, so demanding the bare string would score the wrapping.
    """
    wanted = reference(answer)
    whole = _QUANTITY.fullmatch(wanted.rstrip(".").strip())
    if whole and (whole["unit"] is None or whole["unit"].lower() in _UNIT):
        expected, found = _quantity(whole), list(_QUANTITY.finditer(text))
        if not found:
            return False
        said = _quantity(found[-1])
        return said.value == expected.value and (expected.unit is None or said.unit in (None, expected.unit))
    if re.fullmatch(r"[A-Z]", wanted):
        return _choice(text) == wanted
    needle = _words(wanted)
    return bool(needle) and f" {needle} " in f" {_words(text)} "


def _quantity(found: re.Match[str]) -> _Quantity:
    number = found["number"]
    digits = re.sub(rf"[,'\u2019\u00a0\u202f ]|{_CURRENCY}", "", number).replace("\u2212", "-")
    sign = re.search(_CURRENCY, number)
    return _Quantity(Decimal(digits), _UNIT.get((found["unit"] or (sign[0] if sign else "")).lower()))


def _choice(text: str) -> str | None:
    named = list(_NAMED_CHOICE.finditer(re.sub(r"(?i)\b(answer|choice|option)\b", lambda m: m[0].lower(), text)))
    found = named[-1] if named else _OPENING_CHOICE.search(text.strip())
    return (found[1] or found[2]).upper() if found else None


def _words(text: str) -> str:
    bare = re.sub(r"[^\w\s]", " ", unicodedata.normalize("NFKC", text).lower())
    return " ".join(word for word in bare.split() if word not in {"a", "an", "the"})
