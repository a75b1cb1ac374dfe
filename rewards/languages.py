"""Identifies the languages of a text. The library lingua distinguishes languages that share a script.

Scripts, thresholds and the list of common words were made for this project.
Tested in tests/rewards/test_language_consistency.py.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from rewards.prose import RANGES, UNSPACED, Run, plain, script_runs, without_code_and_quotations

LANGUAGES = [
    "en", "zh", "ja", "ko", "fr", "de", "es", "pt", "it", "nl", "pl", "ru", "uk", "tr",
    "ar", "fa", "hi", "vi", "id", "th", "sv", "cs", "he", "el", "ro", "hu", "fi", "da",
]  # fmt: skip
NEAR = ({"da", "nb", "nn"}, {"id", "ms"}, {"bs", "hr", "sr"}, {"cs", "sk"})
"""Groups of languages that cannot be distinguished in short texts. The identifier's confidences in the languages of a
group are added up. The sum is the confidence in the first loaded language of the group. The other languages of the
group get no confidence."""

MAX_CHUNKS = 160  # maximum number of pieces that are identified; if there are more, evenly spaced pieces are chosen
CHUNK = 40  # minimum number of letters in a piece: the identifier is often wrong about shorter pieces
TELLING = 20  # minimum weight of prose to identify its language; a Latin letter has a weight of about 1
# A piece is foreign if another language has confidence >= SURE and the main language has confidence <= UNLIKELY.
SURE, UNLIKELY = 0.9, 0.05
TERM_WORDS = 3  # up to this many consecutive Latin words inside text of another script count as a name or a term

_KNOWN: dict[str, dict[str, str]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
# Each common word of a language in a piece multiplies the confidence in this language by COMMON. At most MAX_COMMON
# words count.
COMMON, MAX_COMMON = 4.0, 6


@dataclass
class Languages:
    """The languages of one text. A label is the code of a language, or a name such as "Latin script" if only the script
    is known."""

    weights: dict[str, float] = field(default_factory=dict)  # label -> weight of prose, about 1 per Latin letter
    dropped: float = 0.0  # number of characters in code, formulas and quotations, which are ignored

    @property
    def total(self) -> float:
        return sum(self.weights.values())

    @property
    def main(self) -> str | None:
        return max(self.weights, key=lambda label: self.weights[label], default=None)

    def shares(self) -> dict[str, float]:
        return {label: round(w / self.total, 3) for label, w in sorted(self.weights.items(), key=lambda x: -x[1])}


class Identifier:
    """Identifies languages. Loading the 28 default languages takes 0.6 s and 40 MB; with `accurate`, 11 s and 690 MB.

    languages  two or more ISO 639-1 codes. Text in any other language is treated as text in the most
               similar of these languages
    accurate   True: uses lingua's large models
    """

    def __init__(self, languages: Sequence[str], accurate: bool = False):
        self.languages, self.accurate = list(dict.fromkeys(code.lower() for code in languages)), accurate
        self.of_script: dict[str, list[str]] = {}
        for code in self.languages:
            self.of_script.setdefault(_script(code), []).append(code)
        self.common = {code: frozenset(known.get("common", "").split()) for code, known in _KNOWN.items()}
        named = [code for code in self.languages if "names" in _KNOWN.get(code, {})]
        self.names = {code: _pattern(_KNOWN[code]["names"]) for code in named}

    def load(self) -> None:
        """Loads the models. Raises ValueError for unknown codes."""
        import lingua  # imported here because only worker processes need it

        known = {language.iso_code_639_1.name.lower(): language for language in lingua.Language.all()}
        if unknown := [code for code in self.languages if code not in known]:
            raise ValueError(f"no language is called {unknown}; there are: {sorted(known)}")
        for code in self.languages:
            self.names.setdefault(code, _pattern(known[code].name.lower()))
        builder = lingua.LanguageDetectorBuilder.from_languages(*(known[code] for code in self.languages))
        builder = builder.with_preloaded_language_models()
        self.detector = (builder if self.accurate else builder.with_low_accuracy_mode()).build()
        self.confidences("The first question starts its threads, before memory is limited.", self.languages)

    def named_in(self, text: str) -> set[str]:
        """Returns the labels of the languages whose names are in a text."""
        return {self.nearest(code) for code, names in self.names.items() if names.search(text.casefold())}

    def analysed(self, text: str, known: str | None = None) -> Languages:
        """Returns the languages of a text. For an answer, `known` is the question. The answer may have words in another
        script than its main script. These words are ignored if the question contains all of them, or all but one."""
        text = plain(text)
        prose = without_code_and_quotations(text)
        by_script = script_runs(prose)
        weight = {script: sum(r.weight for r in runs) for script, runs in by_script.items()}
        main = max(weight, key=lambda s: weight[s], default=None)
        found = Languages(dropped=max(0.0, float(len(text) - len(prose))))
        for script, runs in by_script.items():
            if known is not None and script != main and _is_one_word(script, {r.text for r in runs}, known):
                continue
            if script == "Latin" and main != "Latin":  # skips names and terms in text of another script
                runs = [r for r in runs if r.words > TERM_WORDS]
            for label, letters in self.labelled(script, runs):
                found.weights[label] = found.weights.get(label, 0.0) + letters
        return found

    def labelled(self, script: str, runs: Sequence[Run]) -> Iterator[tuple[str, float]]:
        """Splits the runs of one script into pieces. Yields the label and the weight of each piece."""
        candidates = self.of_script.get(script, [])
        total = sum(r.weight for r in runs)
        if len(candidates) == 1 and total:
            yield candidates[0], total
        if len(candidates) == 1 or not total:
            return
        if not candidates or total < TELLING:
            yield f"{script} script", total
            return
        chunks = _chunks(runs)
        chosen = [chunks[i * len(chunks) // min(len(chunks), MAX_CHUNKS)] for i in range(min(len(chunks), MAX_CHUNKS))]
        scale = total / sum(weight for _, weight in chosen)
        judged = [(self.confidences(text, candidates), weight * scale) for text, weight in chosen]
        overall: dict[str, float] = {}
        for confidence, weight in judged:
            for code, sureness in confidence.items():
                overall[code] = overall.get(code, 0.0) + weight * sureness / total
        main = max(sorted(overall), key=lambda code: overall[code], default=None)
        sure = main is not None and overall[main] >= (SURE if total < 2 * CHUNK else 0.5)
        for confidence, weight in judged:
            top = max(sorted(confidence), key=lambda code: confidence[code], default=None)
            if top and confidence[top] >= SURE and weight >= CHUNK and main and confidence.get(main, 0.0) <= UNLIKELY:
                yield top, weight
            else:
                yield (main if main and sure else f"{script} script"), weight

    def confidences(self, text: str, candidates: Sequence[str]) -> dict[str, float]:
        """Returns the confidence in each candidate. The confidences in languages of the same group in NEAR are added
        up. The returned confidences add up to 1. Returns {} if no candidate fits."""
        found: dict[str, float] = {}
        words = text.casefold().split()
        for one in self.detector.compute_language_confidence_values(text):
            code = one.language.iso_code_639_1.name.lower()
            if code in candidates and one.value > 0:
                common = min(MAX_COMMON, sum(word in self.common.get(code, ()) for word in words))
                label = self.nearest(code)
                found[label] = found.get(label, 0.0) + one.value * COMMON**common
        total = sum(found.values())
        return {code: value / total for code, value in found.items()}

    def nearest(self, code: str) -> str:
        """Returns the first loaded language of the NEAR group that contains `code`. Returns `code` if no group contains
        it."""
        group = next((group for group in NEAR if code in group), {code})
        return next(c for c in self.languages if c in group)


def same_script(label: str, others: Iterable[str]) -> bool:
    """True if `label` has the same script as one of `others`."""
    return _script(label) in {_script(one) for one in others}


def _is_one_word(script: str, texts: set[str], known: str) -> bool:
    """True if the question `known` contains all of `texts`. One text may be missing there if it is a single word."""
    if len(texts) > MAX_CHUNKS:
        return False
    unknown = [text for text in texts if text not in known]
    short = all(len(text) <= UNSPACED.get(script, len(text)) and " " not in text for text in unknown)
    return len(unknown) <= 1 and short


def _chunks(runs: Sequence[Run]) -> list[tuple[str, float]]:
    """Joins short runs into pieces of at least CHUNK letters. Drops the end of very long runs. Returns (piece, weight)
    pairs."""
    chunks: list[tuple[str, float]] = []
    texts: list[str] = []
    weight = 0.0
    for run in runs:
        texts.append(run.text[: 50 * CHUNK])
        weight += run.weight
        if weight >= CHUNK:
            chunks.append((". ".join(texts), weight))
            texts, weight = [], 0.0
    if texts and chunks:  # the remaining text is too short to be identified alone, so it is added to the last piece
        last, before = chunks.pop()
        chunks.append((". ".join([last, *texts]), before + weight))
    elif texts:
        chunks.append((". ".join(texts), weight))
    return chunks


def _script(label: str) -> str:
    return label.removesuffix(" script") if label.endswith(" script") else _KNOWN.get(label, {}).get("script", "Latin")


def _pattern(names: str) -> re.Pattern[str]:
    """Returns a pattern that finds any of the names. Names in Latin script must be whole words. Names in other scripts
    may also be the beginning of a longer word, because a case ending or a particle may follow."""
    parts = []
    for name in names.split():
        latin = re.match(f"[{RANGES['Latin']}]", name)
        name = re.escape(name.replace("_", " "))
        parts.append(rf"(?<!\w){name}(?!\w)" if latin else name)
    return re.compile("|".join(parts))
