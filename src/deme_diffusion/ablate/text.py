"""A plan's words made comparable: case, accents, dashes, spelling, plurals and endings; and the numbers in them."""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

LONGEST = 2000
"""Characters of a text that are looked at; what a plan says of one thing is shorter."""

_SPELLINGS = (
    (r"[\u2010-\u2015\u2212]", "-"),
    (r"[\u00d7\u2715]", "x"),
    (r"\u03bb", "lambda "),
    (r"\u03b3", "gamma "),
    (r"\u03b7", "eta "),
    (r"\bsnr\s*\+\s*(?:1|one)\b|\bsnr plus (?:1|one)\b", "snrplusone"),
    (r"\bmax\s*\(\s*snr\s*,\s*1\s*\)", "truncated snr"),
    (r"\bmin\s*[\s(-]\s*snr\b(?:\s*,\s*(?:gamma|5)\s*\))?", "minsnr"),
    (r"\bp-?2\b", "ptwo"),
    (r"\bdpm(?:[- ]?solver)?\s*(?:\+\+|pp\b)(?:[\s-]*\(?\d[ms]\b\)?)?", "dpmsolverpp "),
    (r"\bdpm[- ]?solver(?:-\d+)?\b", "dpmsolver"),
    (r"\bkdpm[- ]?2\b|\bdpm-?2\b", "kdpm "),
    (r"\b1\s*x\s*1\b", "onebyone"),
    (r"\bx\s?(\d+(?:\.\d+)?)\b", r"\1x"),
    (r"[\[(]\s*0\s*,\s*t\s*[\])]", " full range "),
    (r"(?<=\w)(?:'|\u2019)s\b", ""),
    (r"\b(?:combination|joint use|combined use|interaction) of\b", " "),
    (r"\b1\s*/\s*[nkm]\b", "uniform"),
    (r"\bn\s*/\s*2\b", "half"),
    (r"\b2\s*n\b", "double"),
    (r"\b3\s*x\s*3\b", "threebythree"),
    (r"\biso[- ]c\b", "isoc"),
    (r"\bdare\s*\+\s*ties\b|\bties\s*\+\s*dare\b", "dare ties"),
    (r"\beuler[- ]?a\b", "eulerancestral"),
    (r"\bfine[- ]?tun", "finetun"),
    (r"\bpre[- ]?train", "pretrain"),
    (r"\btime[- ]?steps?\b", "timestep"),
    (r"\bmulti[- ]?task", "multitask"),
    (r"\bmulti[- ]?model", "multimodel"),
    (r"\bnon[- ](?=[a-z])", "non"),
    (r"\bre[- ](?=weight|parti|init|train|scal)", "re"),
    (r"\bsub[- ](?=[a-z])", "sub"),
    (r"\bu[- ]net\b", "unet"),
    (r"\bgray", "grey"),
    (r"\bw/\s?o\b", "without"),
    (r"\bvs\b\.?", "versus"),
    (r"\be\.\s?g\.?", "suchas"),
    (r"\bi\.\s?e\.?", "thatis"),
    (r"\bsuch as\b|\bfor example\b|\bfor instance\b|\bincluding\b|\blike\b", "suchas"),
)
_COMPILED = tuple((re.compile(pattern), new) for pattern, new in _SPELLINGS)
_WORD_NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "eight": 8, "ten": 10, "twelve": 12}
_WORD_NUMBERS |= {"sixteen": 16, "thirty two": 32}
_FACTORS = {"half": 0.5, "halve": 0.5, "halved": 0.5, "halving": 0.5, "quarter": 0.25, "third": 1 / 3, "double": 2.0}
_FACTORS |= {"doubled": 2.0, "doubling": 2.0, "twice": 2.0, "triple": 3.0, "tripled": 3.0, "thrice": 3.0}
_NUMBER = re.compile(
    r"(?:(?P<symbol>\b[a-z_]+)\s*(?:=|:|of|to|≈|~|is)?\s*)?"
    r"(?<![a-z0-9.])(?P<sign>(?<![\w)\]])-)?"
    r"(?P<digits>[1-9]\d{0,2}(?:,\d{3})+(?![\d.])|\d+(?:\.\d+)?|\.\d+)"
    r"(?:\s*[x*]\s*10\s*\^?\s*\{?(?P<power>[-+]?\d+)\}?|e(?P<exponent>[-+]?\d+)|\^\s*\{?(?P<raised>[-+]?\d+)\}?)?"
    r"\s?(?P<unit>%|percent\b|[km]\b|x\b|times\b|-?fold\b)?"
    r"(?![a-z])"
)
_LESS = re.compile(r"small|low|less|few|reduc|short|decreas|cut")


@dataclass(frozen=True)
class Number:
    """A number with what stands around it: `p = 0.5`, `8 experts`, `50%`, `10x smaller` (a factor of 0.1).

    `each`: it is told for each expert, not for all together.
    """

    value: float
    kind: str = "plain"
    symbol: str = ""
    after: str = ""
    each: bool = False

    def of(self, now: float) -> float:
        """What it makes of a value: a factor scales it, a plain number replaces it."""
        return now * self.value if self.kind == "factor" else self.value

    def __str__(self) -> str:
        return f"x {self.value:g}" if self.kind == "factor" else f"{self.value:g}"


@lru_cache(maxsize=16384)
def normalised(text: str) -> str:
    """Lower case, ASCII dashes, one spelling of what is spelt in several ways; accents and markup gone."""
    text = unicodedata.normalize("NFKD", text[:LONGEST].replace("\u00d7", "x")).casefold()
    text = "".join(c for c in text if not unicodedata.combining(c))
    text = re.sub(r"[*_`$\\{}\"“”]+", " ", re.sub(r"(?<=\w)_(?=\w)", " ", text))
    for pattern, new in _COMPILED:
        text = pattern.sub(new, text)
    return " ".join(text.split())


@lru_cache(maxsize=16384)
def stem(word: str) -> str:
    """A word without its ending, in American spelling: merging, merged, merges -> merg."""
    if word in _KEPT or len(word) < 4:
        return word
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = f"{word[:-3]}y" if word.endswith("ies") else word[:-1]
    word = word.replace("isation", "ization").replace("ising", "izing").replace("ised", "ized")
    word = re.sub(r"(?<=[lt])our$", "or", word)
    word = re.sub(r"is(e[rd]?)$", r"iz\1", word) if len(word) > 6 else word
    word = re.sub(r"ll(?=ing$|ed$)", "l", word)
    for ending in ("ization", "izing", "ized", "ize"):
        if word.endswith(ending):
            return word.removesuffix(ending) + "iz"
    return _ending(word)


_ARTICLES = {"a", "an", "the"}
_KEPT = {
    "partly",
    "weighted",
    "learned",
    "unweighted",
    "ties",
    "bias",
    "less",
    "loss",
    "series",
    "sampler",
    "this",
    "else",
    "base",
    "noise",
    "precise",
}


def _ending(word: str) -> str:
    for ending in ("ing", "ed", "ly"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word.removesuffix(ending)
            if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "ls":
                word = word[:-1]
            break
    word = re.sub(r"ation$", "at", word) if len(word) > 7 else word
    return word.removesuffix("e") if len(word) > 4 or word == "rate" else word


def words(text: str) -> list[str]:
    """Stems of a normalised text in order, numbers left out."""
    return [stem(word) for word in re.findall(r"(?<![a-z0-9])[a-z]+[a-z0-9]*", text) if word not in _ARTICLES]


@lru_cache(maxsize=16384)
def numbers(text: str) -> tuple[Number, ...]:
    """The numbers of a normalised text, in order: decimals, 1e-4, 20K, 50%, factors, and those written as words."""
    found: list[tuple[int, Number]] = []
    for match in _NUMBER.finditer(text):
        if (number := _number(match, text)) is not None:
            found.append((match.start("digits"), number))
    for word, value in (_WORD_NUMBERS | _FACTORS).items():
        for match in re.finditer(rf"\b{word}\b", text):
            kind = "factor" if word in _FACTORS else "plain"
            found.append((match.start(), Number(float(value), kind, "", _next(text, match.end()))))
    return tuple(number for _, number in sorted(found, key=lambda pair: pair[0]))


def _number(match: re.Match[str], text: str) -> Number | None:
    try:
        value = float(match["digits"].replace(",", ""))
        if match["raised"] is not None:
            value **= int(match["raised"]) if abs(int(match["raised"])) < 30 else 0
        power = match["power"] or match["exponent"]
        value = float(f"{value}e{power}") if power else value
        if not math.isfinite(value * 1e6):
            return None
    except (ValueError, OverflowError):
        return None
    value, unit, after = -value if match["sign"] else value, match["unit"] or "", _next(text, match.end())
    symbol = (match["symbol"] or "").strip("_ ")
    if unit in ("k", "m"):
        return Number(value * (1e3 if unit == "k" else 1e6), "plain", symbol, after)
    if unit in ("%", "percent"):
        return Number(value / 100, "percent", symbol, after)
    if unit in ("x", "times", "fold", "-fold"):
        return Number(1 / value if value and _LESS.match(after) else value, "factor", symbol, after)
    return Number(value, "plain", symbol, after)


def _next(text: str, position: int) -> str:
    match = re.match(
        r"[\s-]*(?:(?:the|a|an|of|as|many|number|total|current|original|baseline|equal|different) )*"
        r"(?:timestep (?=rang|inter|seg|subset|group|bin|part|split|expert|cluster|chunk))?([a-z]+)",
        text[position:],
    )
    return stem(match[1]) if match else ""
