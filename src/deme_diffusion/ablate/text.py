"""A plan's words made comparable: case, accents, dashes, spelling, plurals and endings; and the numbers in them."""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

LONGEST = 2000
"""Characters of a text that are looked at; what a plan says of one thing is shorter."""

_REFERENCES = "eqs?|equations?|sec|sections?|figs?|figures?|tab|tables?|appendix"
_SPELLINGS = (
    (r"[\u2010-\u2015\u2212]", "-"),
    (r"[\u00d7\u2715]", "x"),
    (r"[\u03c3\u2211]", " sum "),  # capital sigma, in lower case
    (r"(?:\u03c4|\btau\b)[\s(]?(?:[ijkn]\b\)?)?", " taskvec "),
    (r"(?:\u03b8|\btheta)\s?[ijkn]\b", " thetai "),
    (r"\bw\s?(?:[ijkn]\b|[1-9]\b)(?:\s*\^?\s*\(?\s*l\b\s*\)?)?", " wsymbol "),
    (r"(?:\bbeta|\u03b2)\s?(?:1\b|one\b)", " betaone "),
    (r"(?:\bbeta|\u03b2)\s?(?:2\b|two\b)", " betatwo "),
    (r"\br\s?[ijkn]\b", " range "),
    (r"\bc\s?x\s?c\b", " channelmatrix "),
    (r"\bh\s?x\s?w\b", " hxw "),
    (r"\bw\s?[.*\u00b7]?\s?f\b", " channel projection "),
    (r"\bl\s?simple\b", "lsimple"),
    (r"#\s?(?=[a-z])", "number "),
    (r"\bet al\b\.?,?|(?<=[a-z,(\s])\(?(?:19|20)\d\d[a-z]?\)", " "),
    (
        rf"\(?\b(?:{_REFERENCES})\b\.?\s*\(?\d+(?:\.\d+)*[a-d]?\)?(?:\([a-d]\))?\)?",
        " ",
    ),
    (r"\u03bb", "lambda "),
    (r"\u03b3", "gamma "),
    (r"\u03b7", "eta "),
    (
        r"\b(?:eta|lr|learning rate|lambda|gamma|p|current|baseline|default)\s*/\s*(\d+(?:\.\d+)?)(?!\s*/|\d|e|\.\d)",
        r"\1x smaller",
    ),
    (r"\b(\d+(?:\.\d+)?)\s*[x\u00b7]\s*(?:eta|lr|learning rate|lambda)\b", r"\1x"),
    (r"\bsnr\s*\+\s*(?:1|one)\b|\bsnr plus (?:1|one)\b", "snrplusone"),
    (r"\bmax\s*\(\s*snr\s*,\s*1\s*\)", "truncated snr"),
    (r"\bmin\s*[\s(-]\s*snr\b(?:\s*,\s*(?:gamma|5)\s*\))?", "minsnr"),
    (r"\bp-?2\b", "ptwo"),
    (r"\bdpm(?:[- ]?solver)?\s*(?:\+\+|pp\b)(?:[\s-]*\(?\d[ms]\b\)?)?", "dpmsolverpp "),
    (r"\bdpm[- ]?solver(?:-\d+)?\b", "dpmsolver"),
    (r"\bkdpm[- ]?2\b|\bdpm-?2\b", "kdpm "),
    (r"\b1\s*x\s*1\b", "onebyone"),
    (r"\bx\s?(\d+(?:\.\d+)?)\b(?!\s?\^)", r"\1x"),
    (r"[\[(]\s*0\s*,\s*t\s*[\])]", " full range "),
    (r"(?<=\w)(?:'|\u2019)s\b", ""),
    (r"\b(?:combination|joint use|combined use|interaction) of\b(?=.*\band\b)", " "),
    (r"\b1\s*/\s*[nkm]\b", "uniform"),
    (r"\bn\s*/\s*2\b", "half"),
    (r"\b2\s*n\b", "double"),
    (r"\b3\s*x\s*3\b", "threebythree"),
    (r"\biso[- ]c\b", "isoc"),
    (r"\bdare(?:\s*\+|,? (?:and )?(?:then|followed by))\s*ties\b|\bties\s*\+\s*dare\b", "dare ties"),
    (r"\beuler[- ]?a\b", "eulerancestral"),
    (r"\bclipp(?:ed|ing)\b|\bclip(?= (?:the |gradient|norm|by|at))", "clamped"),
    (r"(?<=\d)\s?(k|m)?\s?its\b", r"\1 iterations"),
    (r"\bproj\b\.?", "projection"),
    (r"\bprob\.(?=\s*[a-z])", "probabilistic "),
    (r"\b8-?bits?\b", "eightbit"),
    (r"\b(?:16|32)-?bits?\b", "fullbit"),
    (r"\bback-?prop\b", "backpropagation"),
    (r"\bfine[- ]?tun", "finetun"),
    (r"\bpre[- ]?train", "pretrain"),
    (r"\btime[- ]?steps?\b", "timestep"),
    (r"\bmini[- ]?batch", "batch"),
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
_UNITS = re.findall(
    r"\w+",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen",
)
_TENS = {name: 20 + 10 * at for at, name in enumerate(re.findall(r"\w+", "twenty thirty forty fifty sixty seventy"))}
_TENS |= {"eighty": 80, "ninety": 90}
_SMALL = {name: value for value, name in enumerate(_UNITS)} | _TENS
_SPELT = re.compile(
    rf"\b(?P<count>{'|'.join(sorted(_SMALL, key=len, reverse=True))})(?:[ -](?P<ones>{'|'.join(_UNITS[1:10])})\b)?"
    r"(?:[ -](?P<scale>hundred|thousand)\b)?(?![a-z])|\ba (?P<alone>hundred|thousand)\b"
)
_FACTORS = {"half": 0.5, "halve": 0.5, "halved": 0.5, "halving": 0.5, "a third": 1 / 3, "one third": 1 / 3}
_FACTORS |= {"two thirds": 2 / 3, "a quarter": 0.25, "one quarter": 0.25, "quarter of": 0.25, "three quarters": 0.75}
_FACTORS |= {"a tenth": 0.1, "one tenth": 0.1, "a fifth": 0.2, "one fifth": 0.2, "double": 2.0, "doubled": 2.0}
_FACTORS |= {"doubling": 2.0, "twice": 2.0, "triple": 3.0, "tripled": 3.0, "thrice": 3.0, "quadruple": 4.0}
_FACTORS |= {"twofold": 2.0, "threefold": 3.0, "fourfold": 4.0, "fivefold": 5.0, "tenfold": 10.0}
_FACTORS |= {"quadrupled": 4.0, "two times": 2.0, "three times": 3.0, "four times": 4.0, "five times": 5.0}
_FACTORS |= {"ten times": 10.0, "order of magnitude": 10.0}
_NUMBER = re.compile(
    r"(?:(?P<symbol>\b[a-z_]+)\s*(?:=|:|of|to|≈|~|is)?\s*)?"
    r"(?<![a-z0-9.])(?P<sign>(?<![\w)\]])-)?"
    r"(?P<digits>(?<![\[(,])[1-9]\d{0,2}(?:(?:,\d{3})*,000|,\d{3}(?!,\d))(?![\d.])|\d+(?:\.\d+)?|\.\d+)"
    r"(?:\s*[x*]\s*10\s*\^?\s*\{?(?P<power>[-+]?\d+)\}?|e(?P<exponent>[-+]?\d+)|\^\s*\{?(?P<raised>[-+]?\d+)\}?)?"
    r"\s?(?P<unit>%|percent\b|[km]\b|x\b|times\b|-?fold\b)?"
    r"(?![a-z])"
)
_FACTOR = re.compile(rf"\b(?:{'|'.join(sorted((w.replace(' ', '[ -]') for w in _FACTORS), key=len, reverse=True))})\b")
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
    text = re.sub(r"(?<=[a-z])\*(?=\d[\d.]*(?![\d.*]))", " x ", text)  # lr*0.1
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
    factors = [(match.span(), _factor(match[0], text, match.end())) for match in _FACTOR.finditer(text)]
    for match in _SPELT.finditer(text):
        if not any(begin <= match.start() < end for (begin, end), _ in factors) and (number := _spelt(match, text)):
            found.append((match.start(), number))
    found += [(begin, number) for (begin, _), number in factors]
    return tuple(number for _, number in sorted(found, key=lambda pair: pair[0]))


def _factor(word: str, text: str, end: int) -> Number:
    value, after = _FACTORS[word.replace("-", " ")], _next(text, end)
    return Number(1 / value if value > 1 and _LESS.match(after) else value, "factor", "", after)


def _spelt(match: re.Match[str], text: str) -> Number | None:
    """`twenty-five`, `two hundred`; a lone one says more of a single thing than of a number."""
    if match["count"] in ("zero", "one") and not match["scale"]:
        return None
    value = _SMALL[match["count"]] + _SMALL.get(match["ones"] or "", 0) if match["count"] else 1
    scale = {"hundred": 100, "thousand": 1000}.get(match["scale"] or match["alone"] or "", 1)
    unit = re.match(r" ?percent\b|%", text[match.end() :])
    after = _next(text, match.end() + (unit.end() if unit else 0))
    return Number(value * scale / (100 if unit else 1), "percent" if unit else "plain", "", after)


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
        r"[\s-]*(?:(?:the|a|an|of|as|many|number|total|consecutive|successive|current|original|baseline|equal"
        r"|different) )*"
        r"(?:timestep (?=rang|inter|seg|subset|group|bin|part|split|expert|cluster|chunk))?([a-z]+)",
        text[position:],
    )
    return stem(match[1]) if match else ""
