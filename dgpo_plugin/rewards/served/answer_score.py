"""The one number that a judge's text means as its score: read where it can be nothing else, refused everywhere else.

A wrong number trains a model on nonsense and nobody notices; a refused one is asked for again. So a score is believed
only where it is declared (``Final Score: 4`` at the beginning of a line or sentence, ``{"score": 4}``, or a number and
nothing else), and where what follows cannot change it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

NUMBER = r"[-+]?(?:[0-9]+(?:[.,][0-9]+)?|\.[0-9]+)"
SIGNS = r"[\s*_#`$]"
"""What may stand around words and numbers without a meaning: spaces, and Markdown's and LaTeX's signs."""
DECOR = rf"{SIGNS}{{0,12}}"
"""At most so many, because what is tried at every place must not take long."""
OPENERS = r"(?:[\[({]|<(?=[^<>\n]{1,20}>)|\\boxed\{){0,3}"
"""Of which ``<`` is one only where it is closed: ``<4`` is less than 4."""
LEAD = r"(?:(?:so|thus|therefore|hence|overall|finally|in conclusion),?\s+)?(?:(?:the|my|our|its)\s+)?"
NAME = r"(?P<final>final[\s_*-]*)?(?:overall[\s_-]*|total[\s_-]*)?(?:score|rating|grade|mark)"
OF_WHAT = r"(?:\s(?:for|of)\s(?:this|the)\s(?:generated\s)?(?:image|picture|photo))?"
NAMED = re.compile(
    rf"(?<![\w-]){LEAD}{NAME}(?![\w-]){OF_WHAT}{DECOR}(?:[(\[](?P<scale>[^()\[\]\n]*)[)\]])?"
    rf"{DECOR}(?P<between>[:=|]|is\b:?)?{DECOR}{OPENERS}{DECOR}(?P<number>{NUMBER})",
    re.IGNORECASE,
)
ALONE = re.compile(rf"{DECOR}{OPENERS}{DECOR}(?P<number>{NUMBER})")
CLOSERS = re.compile(r"[*_`$\])}>]*")
SCALE = re.compile(
    rf"\s*[(\[]?\s*(?:/|(?:out\s+)?of\b|(?:on|in)\s+(?:a|an|the)\s+(?:\w+\s+)?scale\s+(?:of|from)\b|scale\b:?)\s*"
    rf"(?:(?P<low>{NUMBER})\s*(?:to|-|–)\s*)?(?P<high>{NUMBER})(?![.,]?[0-9])(?:[ \t]*[)\]])?",
    re.IGNORECASE,
)
OTHER_SCALE = re.compile(
    rf"\b(?:scale|rang(?:e|es|ing))\s+(?:of|from|between)\s+(?P<low>{NUMBER})\s*(?:to|and|-|–)\s*(?P<high>{NUMBER})"
    r"|\b(?P<points>[0-9]+)[\s-]?points?\s+(?:\w+\s+)?scale\b"
    rf"|^\W*out\s+of\s+(?P<of>{NUMBER})"
    rf"|(?P<best>(?<![0-9.,]){NUMBER})\s*(?:=|is|being|means)\s*(?:the\s+)?(?:best|perfect|highest|excellent)\b",
    re.IGNORECASE | re.MULTILINE,
)
"""A scale that the judge speaks of anywhere in its answer."""
PERCENT = re.compile(r"\s*(?:%|percent\b)", re.IGNORECASE)
UNIT = re.compile(r"\s*(?:points?\b|stars?\b|pts\b|分|点|점)", re.IGNORECASE)
REASON = re.compile(r"(?:[,;(|—–]|-\s|(?:because|since|as|due)\b)", re.IGNORECASE)
"""How the rest of a sentence begins that says why, and not how many."""
COUNTS = re.compile(
    r"[0-9]|\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|half|quarter|third|hundred)\b",
    re.IGNORECASE,
)
CHANGE_OF_MIND = re.compile(
    r"(?:\b(?:wait|correction|on (?:second thoughts?|reflection)|scratch that|let me re\w+|make (?:it|that)"
    r"|i(?:['’]d| would| will|['’]ll)? (?:revise|change|reconsider|lower|raise|reduce|adjust)"
    r"|i(?:['’]d| would) (?:rather )?(?:say|give)(?=(?: it)?(?: an?| about)? [0-9]))\b"
    r"|(?:^|[.!?…]\s+)(?:actually|hmm+|no|sorry|edit|update|just kidding)(?=[,.:…—–-]|\s+-))[^\n]*?"
    rf"(?:{COUNTS.pattern})",
    re.IGNORECASE | re.MULTILINE,
)
GOES_ON = re.compile(r"[.,:'·][0-9]|\s*(?:[-–—~+±/x×^]|to\b|or\b)\s*\.?[0-9]")
"""What makes a number the beginning of a longer one, of a range or of a fraction."""
REST_AT_MOST = 80
DECLINES = re.compile(
    r"\b(?:cannot|can't|can’t|can not|unable to|not able to|won't|won’t|will not|refuse to)\s+(?:be\s+)?"
    r"(?:score|rate|judge|evaluate|assess|grade|determine|give|provide|assign)(?:d|ed)?\b"
    r"(?:\s+(?:it|this|that|them|an?|the|any|final|image|picture|photo|score|rating|number|one))*\s*(?:[.,;!:]|$)",
    re.IGNORECASE | re.MULTILINE,
)
QUOTES = ('""', "“”", "„“", "„”", "«»", "»«", "「」", "『』", "‘’", "‹›")
QUOTATION = re.compile(
    "|".join(rf"{first}[^{first}{last}]*{last}" for first, last in map(tuple, QUOTES))
    + r"|(?<!\w)'[^'\n]+'(?!\w)|`[^`\n]+`"
)
OPEN_QUOTATION = re.compile(r"(?<!\w)[\"“„«「『](?=\S)")
"""The beginning of one that never ends, when those that do are taken out."""
QUOTED_NAME = re.compile(rf"[\"'“”„‘’`「『]\s*((?:{NAME}\s*[:=]?)|{NUMBER})\s*[\"'“”’`」』]", re.IGNORECASE)
INTRODUCED = re.compile(
    r"\b(?:reads?|reading|says?|saying|shows?|showing|displays?|text|written|writing|words?|sign|caption|label|title"
    r"|banner|board|example|format|form)\b[^\n]*:$",
    re.IGNORECASE,
)
"""The end of a line after which something is quoted from the picture, or from the question."""
QUOTES_ON = re.compile(r"\b(?:reads?|reading|says?|saying|written)\b[^\n]*:[ \t*_]*$", re.IGNORECASE | re.MULTILINE)
"""A line after which the whole paragraph is a quotation."""
QUOTED_AT_MOST = 2000
"""Letters of a paragraph that are looked through for such a line."""
HEADING = re.compile(
    r"\W*(?:[0-9]+[.)]|(?:answer|output|assistant|conclusion|results?|judgement|judgment|verdict|evaluation|assessment|summary)"
    r"\W*:)",
    re.IGNORECASE,
)
LARGEST = 1e9
"""No scale goes so far; what JSON holds may not even fit a float."""
SCORE_KEYS = ("score", "rating", "grade", "overallscore", "overallrating", "totalscore")
FINAL_KEYS = ("finalscore", "finalrating", "finalgrade")
WHOLE_KEYS = ("result", "results", "output", "answer", "response", "evaluation", "judgement", "judgment", "final")
"""Under which the whole judgement may stand, and not a criterion's."""
SCALE_KEYS = ("scale", "max", "maximum", "maxscore", "outof", "highest", "range")


@dataclass(frozen=True)
class Scale:
    """The numbers that are valid: from ``lowest`` to ``highest``."""

    lowest: float
    highest: float

    def checked(self, value: float) -> float:
        """The value, if it is valid.

        Raises:
            ValueError: it is not.
        """
        if not self.lowest <= value <= self.highest:
            raise ValueError(f"{value:g}, not from {self.lowest:g} to {self.highest:g},")
        return value

    def check_spoken_of(self, text: str) -> None:
        """Refuse an answer that speaks of another scale: ``On a scale from 0 to 10``, ``a 100-point scale``.

        Raises:
            ValueError: it does.
        """
        for said in OTHER_SCALE.finditer(text):
            if said["points"] is None:
                self.check_same(f"{said['low'] or ''} {said['high'] or said['of'] or said['best']}")
            elif float(said["points"]) not in (self.highest, self.highest - self.lowest + 1):
                raise ValueError(f"a number of another scale ({said.group()})")

    def check_same(self, said: str) -> None:
        """Refuse a scale in words, such as ``1-5`` or ``out of 10``, that is not this one.

        Raises:
            ValueError: it ends elsewhere.
        """
        if "%" in said and self.highest != 100:
            raise ValueError(f"a number of another scale ({said.strip()})")
        ends = re.findall(r"[0-9]+(?:[.,][0-9]+)?", said)
        if ends and (_value(ends[-1]) != self.highest or len(ends) > 2):
            raise ValueError(f"a number of another scale ({said.strip()})")
        if len(ends) == 2 and _value(ends[0]) != self.lowest:
            raise ValueError(f"a number of another scale ({said.strip()})")


def score_in(text: str, scale: Scale) -> float:
    """The one score that a text declares, by the rules above.

    Raises:
        ValueError: it declares none, several, one that is not valid, or one that may mean something else.
    """
    text = _plain(text)
    if said := DECLINES.search(text):
        raise ValueError(f"the judge declines ({said.group().strip()!r})")
    found: list[tuple[float, bool]] = []
    for begin, end, value in reversed(_json_values(text)):
        found += _scores_of(value, scale)
        text = f"{text[:begin]}\n{text[end:]}" if isinstance(value, _Pairs) else text
    own_words = _without_quotations(text)
    scale.check_spoken_of(own_words)
    found += _declared_scores(own_words, scale)
    finals = {value for value, final in found if final}
    values = finals or {value for value, _ in found}
    if not values:
        values = {_alone(text, scale)}
    if len(values) > 1:
        raise ValueError("several numbers")
    return scale.checked(values.pop())


def matched_score(text: str, pattern: re.Pattern[str], scale: Scale) -> float:
    """The one number that a pattern of the user's finds, as its first group.

    Raises:
        ValueError: it finds none, several, one that is not valid, or only the beginning of a longer one.
    """
    values = set()
    for match in pattern.finditer(text):
        before, rest = text[: match.start(1)][-1:], _half_width(text[match.end(1) :][:REST_AT_MOST])
        # What the pattern itself asks for around the group, its writer knows of.
        if match.start() == match.start(1) and before and before in "0123456789.,/−-":
            raise ValueError("a part of a longer number")
        if match.end() == match.end(1):
            if said := SCALE.match(rest):
                scale.check_same(said.group())
            elif rest[:1].isnumeric() or GOES_ON.match(rest) or (PERCENT.match(rest) and scale.highest != 100):
                raise ValueError("a part of a longer number")
        values.add(_value(match.group(1) or ""))
    if len(values) != 1:
        raise ValueError("several numbers" if values else "no number")
    return scale.checked(values.pop())


def _value(number: str) -> float:
    """A number as people write it, with a point or a comma before the decimals.

    Raises:
        ValueError: not a number, or one whose comma may stand between thousands.
    """
    number = number.strip()
    if re.fullmatch(r"-?[0-9]{1,3}(?:,[0-9]{3})+", number):
        raise ValueError(f"a number whose comma may mean two things ({number})")
    try:
        if "_" in number:  # which Python reads
            raise ValueError
        return float(re.sub(r"(?<=[0-9]),(?=[0-9]+$)", ".", number))
    except ValueError as error:
        raise ValueError(f"no number ({number!r})") from error


def _half_width(text: str) -> str:
    """The text in half-width signs and ASCII digits, without invisible signs.

    Not Unicode's NFKC, which makes ``41/2`` of four and a half and ``42`` of a four with a footnote.
    """
    signs = []
    for sign in text.translate(SAME):
        if 0xFF01 <= ord(sign) <= 0xFF5E:
            sign = chr(ord(sign) - 0xFEE0)
        digit = unicodedata.decimal(sign, None)
        if digit is not None:
            signs.append(str(digit))
        elif unicodedata.category(sign) != "Cf":
            signs.append(sign)
    return "".join(signs)


def _plain(text: str) -> str:
    """The text in half-width signs, without neutral tags and the fences of code."""
    plain = re.sub(r"<(?:final[_ ]?)?(?:score|rating)>", "\nScore: ", _half_width(text), flags=re.IGNORECASE)
    plain = NEUTRAL_TAGS.sub(lambda tag: "" if tag.group(1) else "\n", plain)
    return re.sub(r"^\s*(?:```|~~~)\w*[ \t]*$", "", plain, flags=re.MULTILINE).strip()


SAME = str.maketrans("\u3000\u00a0−∶꞉︰。٫⁄∕【】", "  -:::..//[]")
NEUTRAL_TAGS = re.compile(
    r"</?(?:(b|strong|i|em|u|span|code)|answer|output|response|result|p|div|br ?/?"
    r"|(?:final[_ ]?)?(?:score|rating|answer))>|<\|?/?\w+\|>|</s>|<eos>|<end_of_turn>",
    re.IGNORECASE,
)
JSON_BEGINS = re.compile(r"^[ \t]*(?=[\[{])", re.MULTILINE)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with all its members: a dict keeps the last of two with one name."""


def _json_values(text: str) -> list[tuple[int, int, Any]]:
    """JSON that stands on lines of its own: where it begins and ends, and its value."""
    decoder = json.JSONDecoder(object_pairs_hook=_Pairs)
    found, at = [], 0
    while begins := JSON_BEGINS.search(text, at):
        try:
            value, at = decoder.raw_decode(text, begins.end())
        except (ValueError, RecursionError):
            at = begins.end() + 1
            continue
        if not text[at:].split("\n")[0].strip(" \t.,`"):
            found.append((begins.end(), at, value))
    return found


def _scores_of(value: Any, scale: Scale) -> Iterator[tuple[float, bool]]:
    """Every member of a JSON value that is called a score, but for those of single criteria."""
    if isinstance(value, list) and not isinstance(value, _Pairs) and len(value) == 1:
        yield from _scores_of(value[0], scale)
    members = value if isinstance(value, _Pairs) else []
    named = [(re.sub(r"[\s_-]", "", key).lower(), member) for key, member in members]
    for key, member in named:
        if key in WHOLE_KEYS:
            yield from _scores_of(member, scale)
        if key not in SCORE_KEYS + FINAL_KEYS:
            continue
        for other, said in named:
            if other in SCALE_KEYS:
                scale.check_same(str(said))
        if isinstance(member, str):
            yield _alone(member, scale), key in FINAL_KEYS
        elif isinstance(member, bool) or not isinstance(member, int | float) or not abs(member) < LARGEST:
            raise ValueError("no number")
        else:
            yield float(member), key in FINAL_KEYS


def _without_quotations(text: str) -> str:
    """The text with what it quotes taken out, in quotation marks or behind Markdown's ``>``."""
    text = QUOTED_NAME.sub(r"\1", text)
    text = re.sub(r"^[ \t]*`+([^`\n]+)`+[ \t]*$", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"^[ \t]*>.*$", "", text, flags=re.MULTILINE)
    if whole := re.fullmatch(r"[\"“]([^\"“”]*)[\"”]\.?", text.strip()):
        return whole.group(1)
    return QUOTATION.sub(" quotation ", text)


def _declared_scores(text: str, scale: Scale) -> list[tuple[float, bool]]:
    """Scores that the text declares, each with whether it is called final; and those that it names otherwise.

    Raises:
        ValueError: one that may mean something else, or of which the text thinks better.
    """
    declared, named, last = [], [], 0
    opened = OPEN_QUOTATION.search(text)
    quoted_from = len(text) if opened is None else opened.start()
    for match in NAMED.finditer(text):
        final = match["final"] is not None
        if match["between"] is None and not final:
            continue
        if match.start() > quoted_from or not _begins(text[: match.start()]):
            named.append((match["number"], final))
            continue
        if match["between"] is None and match["number"].startswith("-"):
            raise ValueError("a dash that may be a minus")
        scale.check_same(match["scale"] or "")
        value = _value(match["number"])
        _check_rest(text[match.end() :], scale, value, own_line="\n" in match.group().strip())
        declared.append((value, final))
        last = match.end()
    if declared and CHANGE_OF_MIND.search(text, last):
        raise ValueError("a number that is taken back")
    # What is only spoken of makes no score, but may contradict one.
    if any(final for _, final in declared):
        declared += [(_value(number), True) for number, final in named if final]
    return declared


def _begins(before: str) -> bool:
    """Whether a line or sentence begins after this text, and is the judge's own and not introduced as a quotation."""
    earlier, _, line = before.rpartition("\n")
    line = re.sub(r"(?:_|[^\w\"'.,:;!?|)\]])+$", "", line)
    if not line or HEADING.fullmatch(line):
        earlier = earlier[-QUOTED_AT_MOST:]
        line_above = earlier.rstrip(" \t\n*_`#").rpartition("\n")[2]
        return not (INTRODUCED.search(line_above) or QUOTES_ON.search(earlier.rpartition("\n\n")[2]))
    return line[-1] in ".!?;|" and not re.search(r"\b(?:e\.g|i\.e|ex)\.$", line)


def _alone(text: str, scale: Scale) -> float:
    """The number that a text is, with nothing beside it but its scale.

    Raises:
        ValueError: it is anything else.
    """
    text = text.strip().strip("\"'“”").rstrip(".")
    match = ALONE.match(text)
    if match is None:
        raise ValueError("no number")
    rest, value = text[match.end() :], _value(match["number"])
    left = _check_rest(rest, scale, value, own_line=True)
    if left.strip():
        raise ValueError("no number that is called a score")
    return value


def _check_rest(rest: str, scale: Scale, value: float, *, own_line: bool) -> str:
    """What follows a number, behind its line; refused if it may change the number.

    Args:
        own_line: the number must end its line.

    Raises:
        ValueError: it may: a range, another scale, a unit, more digits, a second thought.
    """
    unclear = ValueError(
        f"a number that may mean something else ({value:g}{rest.splitlines()[0][:40] if rest else ''})"
    )
    rest = rest[CLOSERS.match(rest).end() :]  # type: ignore[union-attr]  # it matches the empty text too
    if said := PERCENT.match(rest):
        if scale.highest != 100:
            raise unclear
        rest = rest[said.end() :]
    if said := SCALE.match(rest):
        scale.check_same(said.group())
        rest = rest[said.end() :]
    if said := UNIT.match(rest):
        rest = rest[said.end() :]
        if said := SCALE.match(rest):
            scale.check_same(said.group())
            rest = rest[said.end() :]
    line, _, left = rest.partition("\n")
    line = line.strip(" \t\r*_`#$])}>")
    if all(unicodedata.category(sign) in ("So", "Mn", "Me", "Zs") for sign in line):
        return left
    sentence = line.lstrip(".!")
    if sentence != line and not own_line:
        listed = value == 1 and re.search(r"\b2[.)]\s", sentence)
        if sentence and (not sentence[0].isspace() or re.match(r"\s+\W*[0-9]", sentence) or listed):
            raise unclear
        return left
    if own_line and not sentence:
        return left
    reason = re.split(r"[.!](?:\s|$)", line)[0]
    if own_line or not REASON.match(line) or COUNTS.search(reason) or any(sign.isnumeric() for sign in reason):
        raise unclear
    return left
