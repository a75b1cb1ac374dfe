"""Behaviour penalty `language_consistency`: an answer in another language than the question, or in two at once.

The report discourages "code-switching and question-answer language mismatch" with a model-based penalty and gives
neither the model nor a threshold. Everything measured below (script counts, a language identifier, the numbers) is a
reconstruction.
"""

# ruff: noqa: RUF001  # letters of many scripts are what this file is about

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewards import Rollout, Score, penalty

# fmt: off
LANGUAGES = [
    "en", "zh", "ja", "ko", "fr", "de", "es", "pt", "it", "nl", "pl", "ru", "uk", "tr",
    "ar", "fa", "hi", "vi", "id", "th", "sv", "cs", "he", "el", "ro", "hu", "fi", "da",
]
# fmt: on
NEAR = ({"da", "nb", "nn"}, {"id", "ms"}, {"bs", "hr", "sr"}, {"cs", "sk"})
"""Languages that short texts cannot tell apart. Their confidences are added up, under the first one loaded."""

MAX_CHARS = 1 << 18  # of a text; of a longer one, the first and last halves of this are read
MAX_CHUNKS = 160  # pieces of text the identifier is asked about; of more, evenly spaced ones
CHUNK = 40  # letters in a piece, at least: below this the identifier is often wrong
TELLING = 20  # weight (about: Latin letters) of prose below which a language is not named
SCRIPT_TELLING = 5  # the same for a script: two Han characters or a short Latin word
SURE, UNLIKELY = 0.9, 0.05  # confidence of a piece's language and of the answer's main one, for a switch to count
TERM_WORDS = 3  # a Latin run this long inside another script is a name, an acronym or a technical term

_RANGES = {
    "Latin": "A-Za-zªºÀ-ÖØ-öø-ʯḀ-ỿ",
    "Greek": "Ͱ-ͽͿ-Ͽἀ-῿",
    "Cyrillic": "Ѐ-ԯ",
    "Armenian": "Ա-Ֆՙ-֏",
    "Hebrew": "\u05b0-\u05f4",
    "Arabic": "\u0620-\u063f\u0641-\u065f\u066e-\u06d3\u06d5\u06fa-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufefc",
    "Devanagari": "\u0900-\u0963\u0970-\u097f",
    "Bengali": "\u0980-\u09e3",
    "Gurmukhi": "\u0a00-\u0a65\u0a70-\u0a7f",
    "Gujarati": "\u0a80-\u0ae3",
    "Tamil": "\u0b80-\u0be5",
    "Telugu": "\u0c00-\u0c65",
    "Kannada": "\u0c80-\u0ce5",
    "Malayalam": "\u0d00-\u0d65",
    "Thai": "\u0e01-\u0e3a\u0e40-\u0e4e",
    "Georgian": "\u10a0-\u10ff",
    "Hangul": "\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3",
    "Kana": "\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9d",
    "Han": "\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f",
}
_WORD = re.compile(
    "|".join(f"(?P<{s}>[{r}][{r}\u0300-\u036f]*+(?:['’][{r}\u0300-\u036f]++)*+)" for s, r in _RANGES.items())
)
_LETTERS_PER_SIGN = {"Han": 3, "Kana": 2, "Hangul": 2}
_UNSPACED = {"Han": 4, "Kana": 8, "Thai": 12}  # scripts without blanks between words, and letters of a long word
_HIRAGANA, _HIRAGANA_OR_HAN = re.compile("[ぁ-ゖ]"), re.compile(f"[ぁ-ゖ{_RANGES['Han']}]")
_SCRIPT_OF = {
    **dict.fromkeys(["ru", "uk", "be", "bg", "mk", "kk", "mn"], "Cyrillic"),
    **dict.fromkeys(["ar", "fa", "ur"], "Arabic"),
    **dict.fromkeys(["hi", "mr"], "Devanagari"),
    **{"zh": "Han", "ja": "Kana", "ko": "Hangul", "th": "Thai", "el": "Greek", "he": "Hebrew", "hy": "Armenian"},
    **{"ka": "Georgian", "bn": "Bengali", "pa": "Gurmukhi", "gu": "Gujarati", "ta": "Tamil", "te": "Telugu"},
}  # any other language: Latin

# The names under which a question may ask for a language: its English name, its own, the Chinese and Japanese ones,
# and for English those of the languages that most often ask for it.
_NAMES = {
    "en": "english englisch englische englischen anglais inglés inglês inglese engels engelska angielski ingilizce "
    "английск англійськ 英文 英语 英語 영어 الإنجليزية انگلیسی अंग्रेज़ी अंग्रेजी tiếng_anh inggris ภาษาอังกฤษ",
    "zh": "chinese mandarin 中文 汉语 漢語 中国語 普通话 华语 中国话 китайск chinois chino chinesisch 중국어",
    "ja": "japanese 日本語 日语 日文 日語 японск japonais japonés japanisch 일본어",
    "ko": "korean 한국어 한국말 韩语 韩文 韓語 韓国語 корейск coréen coreano koreanisch",
    "fr": "french français française 法语 法文 法語 フランス語 французск francés französisch 프랑스어",
    "de": "german deutsch deutsche 德语 德文 德語 ドイツ語 немецк allemand alemán 독일어",
    "es": "spanish español castellano 西班牙语 西班牙文 スペイン語 испанск espagnol spanisch 스페인어",
    "pt": "portuguese português 葡萄牙语 葡萄牙文 ポルトガル語 португальск portugais",
    "it": "italian italiano 意大利语 意大利文 イタリア語 итальянск italien italienisch",
    "nl": "dutch nederlands 荷兰语 オランダ語 нидерландск niederländisch néerlandais",
    "pl": "polish polski polsku 波兰语 ポーランド語 польск polnisch polonais",
    "ru": "russian русск 俄语 俄文 俄語 ロシア語 russe ruso russisch",
    "uk": "ukrainian українськ 乌克兰语 украинск",
    "tr": "turkish türkçe 土耳其语 トルコ語 турецк",
    "ar": "arabic العربية 阿拉伯语 アラビア語 арабск arabe árabe arabisch",
    "fa": "persian farsi فارسی 波斯语 персидск",
    "hi": "hindi हिन्दी हिंदी 印地语",
    "vi": "vietnamese tiếng_việt 越南语 越南文 베트남어",
    "id": "indonesian indonesia 印尼语 印度尼西亚语",
    "th": "thai ภาษาไทย 泰语 泰文",
    "sv": "swedish svenska 瑞典语",
    "cs": "czech čeština česky 捷克语",
    "he": "hebrew עברית 希伯来语",
    "el": "greek ελληνικά 希腊语",
    "ro": "romanian română 罗马尼亚语",
    "hu": "hungarian magyar magyarul 匈牙利语",
    "fi": "finnish suomi suomeksi 芬兰语",
    "da": "danish dansk 丹麦语",
}

# Words that no sentence does without. The identifier's small models know letters only, and call "the longest side is
# the hypotenuse" French; each of these it meets makes a language COMMON times likelier, MAX_COMMON of them at most.
_COMMON = {
    "en": "the of is and to that we are this it by with from for so which be in",
    "fr": "le la les des est et une un dans que qui pour du on donc sur par avec ce nous",
    "de": "der die das und ist den dem ein eine nicht mit von auf für wir also zu wird dann im",
    "es": "el la los las es y una un en que por del para con se como entonces su al son",
    "pt": "o os as é e uma um em que por do da para com se como então não na no são",
    "it": "il lo gli è e una un di che per del della con si come quindi sono nel i",
    "nl": "de het een en is van dat op voor met zijn niet dus wij we te door ook dan",
    "pl": "jest i w na się z że to nie do są więc przez dla jak oraz od ma",
    "tr": "ve bir bu için ile olarak olan ise değil çok o da de dir",
    "vi": "là và của các một có cho trong được với không này khi ta bằng",
    "id": "yang dan di ini itu dari adalah dengan untuk pada ke kita jadi tidak sama",
    "sv": "och är det en ett att som på för med av den inte så vi till har",
    "cs": "je a v na se že to s z pro jsou tedy není do jako od by",
    "ro": "este și în o un pe la cu din că de sunt pentru deci nu se",
    "hu": "a az és egy hogy nem is van ez tehát meg azt ha ezért",
    "fi": "on ja se ei että joten joka ovat niin kun siis sen tämä",
    "da": "og er det en et at som på for med af den ikke så vi til har",
}
COMMON, MAX_COMMON = 4.0, 6

_FENCE = re.compile(r"^[ \t>]{0,16}+(`{3,}+|~{3,}+)([^\n]*+)$", re.MULTILINE)
_ENVIRONMENT = re.compile(
    r"\\(begin|end)\{(?:equation|align|aligned|alignat|gather|gathered|multline|split|cases|array|eqnarray|math|"
    r"displaymath|tabular|verbatim|lstlisting|minted|tikzpicture|[a-zA-Z]?matrix|smallmatrix)\*?\}"
)
# Each alternative that needs an end looks for it over a bounded length and stops at the next start of its kind, so
# that unbalanced marks cost linear time and leave the text after them in the check.
_NOT_PROSE = re.compile(
    r"""
      `{1,2}+[^`\n]{1,400}+`{1,2}+
    | \$\$[^$]{1,4000}+\$\$
    | \$(?!\s)[^$\n]{1,1000}+(?<!\s)\$(?!\d)
    | \\\[(?:[^\\]|\\[^][]){0,4000}+\\\]
    | \\\((?:[^\\]|\\[^()]){0,2000}+\\\)
    | \\(?:begin|end)\{[a-zA-Z]{1,30}+\*?\} | \\[a-zA-Z]++\*?
    | (?:https?|ftp)://[^\s<>]++ | (?<!\w)www\.[^\s<>]++
    | </?[a-zA-Z][^<>\n]{0,200}+>
    | "[^"\n]{1,300}+" | “[^“”\n]{1,300}+” | „[^„“”\n]{1,300}+[“”] | «[^«»\n]{1,300}+»
    | 「[^「」\n]{1,300}+」 | 『[^『』\n]{1,300}+』 | 《[^《》\n]{1,100}+》
    | ^[ ]{0,3}>[^\n]*+$
    | \b(?:sin|cos|tan|log|exp|lim|max|min|mod|gcd|lcm)\b
    | (?<![A-Za-z0-9_])(?=[A-Za-z_]{0,40}+\d)[A-Za-z0-9_]++
    """,
    re.VERBOSE | re.MULTILINE,
)
_SENTENCE = re.compile(r"(?:[^.!?。！？।؟；\n]|[.!?](?!\s|\Z))++")
_FULL_WIDTH = {0xFF01 + i: 0x21 + i for i in range(94)}


@dataclass
class Languages:
    """The languages of one text: weight of prose (about: Latin letters) per label. A label is a language's code, or
    "Latin script" and the like where the script is all that can be told."""

    weights: dict[str, float] = field(default_factory=dict)
    dropped: float = 0.0  # letters that do not count: code, formulas, quotations, terms

    @property
    def total(self) -> float:
        return sum(self.weights.values())

    @property
    def main(self) -> str | None:
        return max(self.weights, key=lambda label: self.weights[label], default=None)

    def shares(self) -> dict[str, float]:
        return {label: round(w / self.total, 3) for label, w in sorted(self.weights.items(), key=lambda x: -x[1])}


@penalty("language_consistency", on_timeout="lowest")
class LanguageConsistency:
    """1.0 if the answer is not in the question's language, or not in one language, else 0.0.

    That is: if it (a) is in another language than the question, or (b) has more than `tolerance` of its prose in a
    second language. Details: the languages, their shares and why.

    The question is the text of the last user message. Allowed are its language or languages; every language that a
    user or system message names ("into French", "用英文回答"), whatever the reason it is named for; and the script of
    the question's first and last word, where instructions about text in another language stand. A question too short
    to tell only fixes the script ("Solve it" does not ask for Chinese), one without any prose fixes nothing.

    What does not count: code, formulas, quotations up to 300 characters, blockquotes, URLs, words with digits, Latin
    names and terms of up to three words in text of another script (until they are over half of the prose), a single
    foreign word, and foreign words taken from the question. Fences and delimiters that never close hide nothing. An
    answer of nothing but code or quotations is therefore not judged; its details say so. Two languages of one script
    are told apart by pieces of forty letters, so a switch of one word between, say, English and Spanish goes
    unnoticed.

    Scripts decide wherever they can; lingua's identifier, with a list of common words, is asked about the rest (Latin,
    Cyrillic, Arabic). Loading the 28 default languages takes 0.6 s and 40 MB; with `accurate`, 11 s and 690 MB.

    languages  ISO 639-1 codes to tell apart, two or more; text in others is taken for the nearest of them
    tolerance  share of the prose in a second language that is let pass (reconstruction)
    reasoning  whether what stands before `</think>` is judged too (the report speaks of questions and answers)
    accurate   lingua's large models

    Raises ValueError for unknown languages, ImportError where lingua-language-detector is not installed.
    """

    def __init__(
        self,
        languages: list[str] | None = None,
        tolerance: float = 0.1,
        reasoning: bool = False,
        accurate: bool = False,
    ):
        self.languages = list(dict.fromkeys(code.lower() for code in languages or LANGUAGES))
        if len(self.languages) < 2:
            raise ValueError(f"language_consistency: languages is {languages}; it takes two or more to tell apart")
        if not 0 <= tolerance < 1:
            raise ValueError(f"language_consistency: tolerance is {tolerance}; it is a share from 0 to below 1")
        self.tolerance, self.reasoning, self.accurate = tolerance, reasoning, accurate
        self.of_script: dict[str, list[str]] = {}
        for code in self.languages:
            self.of_script.setdefault(_SCRIPT_OF.get(code, "Latin"), []).append(code)
        self.common = {code: frozenset(words.split()) for code, words in _COMMON.items()}
        self.named = {code: _pattern(_NAMES[code]) for code in self.languages if code in _NAMES}

    def setup(self) -> None:
        try:
            import lingua
        except ImportError as e:
            raise ImportError("language_consistency needs lingua: pip install lingua-language-detector") from e
        known = {language.iso_code_639_1.name.lower(): language for language in lingua.Language.all()}
        if unknown := [code for code in self.languages if code not in known]:
            raise ValueError(f"language_consistency: no language is called {unknown}; there are: {sorted(known)}")
        for code in self.languages:
            self.named.setdefault(code, _pattern(known[code].name.lower()))
        builder = lingua.LanguageDetectorBuilder.from_languages(*(known[code] for code in self.languages))
        builder = builder.with_preloaded_language_models()
        self.detector = (builder if self.accurate else builder.with_low_accuracy_mode()).build()
        self.confidences("The first question starts its threads, before memory is limited.", self.languages)

    def __call__(self, rollout: Rollout) -> Score:
        question = _question(rollout.prompt.messages)
        allowed = self.allowed(question, rollout.prompt.messages)
        parts = {"answer": rollout.answer, "reasoning": rollout.reasoning if self.reasoning else ""}
        details: dict[str, Any] = {"allowed": sorted(allowed)}
        offence = 0.0
        for part, text in parts.items():
            if text:
                found = self.analysed(text, known=question)
                why = self.judged(found, allowed)
                offence = max(offence, float(why.startswith(("another", "mixed"))))
                details[part] = {"languages": found.shares(), "why": why}
        return Score(offence, details)

    def judged(self, found: Languages, allowed: set[str]) -> str:
        """What is to be said of a text's languages; offences start with "another" or "mixed"."""
        main = found.main
        if main is None or found.total < TELLING:
            hidden = ", and nearly all of it is code, formulas or quotations" if found.dropped > 10 * TELLING else ""
            other = main and allowed and found.total >= 2 * SCRIPT_TELLING and not self.same_script(main, allowed)
            return f"another script: {main}" if other else f"too little prose to tell{hidden}"
        if allowed and not self.agrees(main, allowed):
            return f"another language: {main}"
        foreign = {
            label: weight / found.total
            for label, weight in found.weights.items()
            if not self.agrees(label, allowed | {main})
        }
        if sum(foreign.values()) > self.tolerance:
            return f"mixed: {', '.join(foreign)} in {main}"
        return "consistent"

    def allowed(self, question: str, messages: Sequence[Mapping[str, Any]]) -> set[str]:
        """Labels an answer may be in; empty if the question does not tell."""
        found = self.analysed(question)
        if found.total < SCRIPT_TELLING:
            return set()
        labels = {label for label, weight in found.weights.items() if weight >= max(SCRIPT_TELLING, found.total / 10)}
        # An instruction about text of another script stands at one end of it, however short it is.
        words = list(_WORD.finditer(without_code_and_quotations(_visible(question))))
        for word in (*words[:1], *words[-1:]):
            script = f"{word.lastgroup} script"
            if not (self.same_script(script, labels) or (word.lastgroup == "Han" and "ja" in labels)):
                labels.add(script)
        asked = "\n".join(_text(m)[:MAX_CHARS] for m in messages if m.get("role") != "assistant").casefold()
        return labels | {self.nearest(code) for code, pattern in self.named.items() if pattern.search(asked)}

    def analysed(self, text: str, known: str | None = None) -> Languages:
        """The languages of a text. With the text of the question as `known`, as those of an answer: words that the
        question contains, and a single word more, do not count as foreign."""
        text = _visible(text)
        prose = without_code_and_quotations(text)
        by_script = self.runs(prose)
        weight = {script: sum(r.weight for r in runs) for script, runs in by_script.items()}
        main = max(weight, key=lambda s: weight[s], default=None)
        found = Languages(dropped=max(0.0, float(len(text) - len(prose))))
        for script, runs in by_script.items():
            if known is not None and script != main and _is_one_word(script, {r.text for r in runs}, known):
                continue
            if script == "Latin" and main != "Latin":  # in text of another script
                runs = [r for r in runs if r.words > TERM_WORDS]
            for label, letters in self.labelled(script, runs):
                found.weights[label] = found.weights.get(label, 0.0) + letters
        return found

    def runs(self, prose: str) -> dict[str, list["Run"]]:
        """The stretches of one script, sentence by sentence. Chinese and Japanese share Han: hiragana decide."""
        found: dict[str, list[Run]] = {}
        japanese = _is_japanese(prose)
        for sentence in _SENTENCE.findall(prose):
            words = [(m.lastgroup or "", m[0]) for m in _WORD.finditer(sentence)]
            words = [(s, w) for s, w in words if not (s == "Greek" and len(w) < 3)]  # the letters of formulas
            han = sum(len(w) for s, w in words if s == "Han")
            # Japanese nouns may be Han alone, but no sentence of a dozen characters is.
            if _is_japanese(sentence) or (japanese and han < 12):
                words = [("Kana" if s == "Han" else s, w) for s, w in words]
            korean = any(s == "Hangul" for s, _ in words)
            for run in _joined(words):
                # Hanja in Korean are glosses of its own words.
                if not (run.script == "Han" and korean and len(run.text) <= 4):
                    found.setdefault(run.script, []).append(run)
        return found

    def labelled(self, script: str, runs: Sequence["Run"]) -> Iterator[tuple[str, float]]:
        """Label and weight of each piece of one script's runs."""
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
        """How sure the identifier is of each candidate, near relatives taken together; sums to 1 or nothing."""
        found: dict[str, float] = {}
        words = text.casefold().split()
        for one in self.detector.compute_language_confidence_values(text):
            code = one.language.iso_code_639_1.name.lower()
            if code in candidates and one.value > 0:
                common = min(MAX_COMMON, sum(word in self.common[code] for word in words)) if code in self.common else 0
                relative = self.nearest(code)
                found[relative] = found.get(relative, 0.0) + one.value * COMMON**common
        total = sum(found.values())
        return {code: value / total for code, value in found.items()}

    def nearest(self, code: str) -> str:
        relatives = next((group for group in NEAR if code in group), {code})
        return next(c for c in self.languages if c in relatives)

    def agrees(self, label: str, allowed: set[str]) -> bool:
        """Whether a label is allowed; one that only names a script agrees with every language of that script."""
        if label in allowed:
            return True
        scripts = {one for one in allowed if one.endswith(" script")}
        return self.same_script(label, allowed if label.endswith(" script") else scripts)

    def same_script(self, label: str, allowed: Iterable[str]) -> bool:
        return _script(label) in {_script(one) for one in allowed}


@dataclass(frozen=True)
class Run:
    """Consecutive words of one script within a sentence."""

    script: str
    text: str
    words: int
    weight: float


def without_code_and_quotations(text: str) -> str:
    """The prose of a text: code, formulas, quotations, URLs, tags and words with digits replaced by a blank."""
    text = _cut(text, _fenced(text))
    text = _cut(text, _environments(text))
    return _NOT_PROSE.sub(" ", text)


def _fenced(text: str) -> Iterator[tuple[int, int]]:
    opened: re.Match[str] | None = None
    for line in _FENCE.finditer(text):
        if opened is None:
            opened = line
        elif line[1].startswith(opened[1]) and not line[2].strip():
            yield opened.start(), line.end()
            opened = None


def _environments(text: str) -> Iterator[tuple[int, int]]:
    depth, start = 0, 0
    for mark in _ENVIRONMENT.finditer(text):
        if mark[1] == "begin":
            start = start if depth else mark.start()
            depth += 1
        elif depth:
            depth -= 1
            if not depth:
                yield start, mark.end()


def _cut(text: str, spans: Iterable[tuple[int, int]]) -> str:
    kept, position = [], 0
    for start, end in spans:
        kept.append(text[position:start])
        position = end
    return "\n".join([*kept, text[position:]])


def _visible(text: str) -> str:
    """Without control and direction marks and lone surrogates, full-width letters made plain, bounded in length."""
    if len(text) > MAX_CHARS:
        text = text[: MAX_CHARS // 2] + "\n" + text[-MAX_CHARS // 2 :]
    kept = (c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    return "".join(kept).translate(_FULL_WIDTH)


def _joined(words: Sequence[tuple[str, str]]) -> Iterator[Run]:
    start = 0
    for end in range(1, len(words) + 1):
        if end == len(words) or words[end][0] != words[start][0]:
            script, texts = words[start][0], [word for _, word in words[start:end]]
            # Single Latin letters are variables more often than words: they help to identify but do not weigh.
            weighing = [t for t in texts if script != "Latin" or len(t) > 1]
            weight = _LETTERS_PER_SIGN.get(script, 1) * sum(len(t) for t in weighing)
            if weight:
                yield Run(script, ("" if script in _UNSPACED else " ").join(texts), len(weighing), float(weight))
            start = end


def _is_japanese(text: str) -> bool:
    """Whether Han come with hiragana; a Chinese text may have a name in katakana."""
    return len(_HIRAGANA.findall(text)) > 0.08 * len(_HIRAGANA_OR_HAN.findall(text))


def _is_one_word(script: str, texts: set[str], known: str) -> bool:
    """Whether what a text has of a second script is no more than one word that the question does not contain."""
    if len(texts) > MAX_CHUNKS:
        return False
    unknown = [text for text in texts if text not in known]
    short = all(len(text) <= _UNSPACED.get(script, len(text)) and " " not in text for text in unknown)
    return len(unknown) <= 1 and short


def _chunks(runs: Sequence[Run]) -> list[tuple[str, float]]:
    """Runs put together to pieces of at least CHUNK letters, and long ones cut, with their weights."""
    chunks: list[tuple[str, float]] = []
    texts: list[str] = []
    weight = 0.0
    for run in runs:
        texts.append(run.text[: 50 * CHUNK])
        weight += run.weight
        if weight >= CHUNK:
            chunks.append((". ".join(texts), weight))
            texts, weight = [], 0.0
    if texts and chunks:  # a short rest says little by itself
        last, before = chunks.pop()
        chunks.append((". ".join([last, *texts]), before + weight))
    elif texts:
        chunks.append((". ".join(texts), weight))
    return chunks


def _script(label: str) -> str:
    return label.removesuffix(" script") if label.endswith(" script") else _SCRIPT_OF.get(label, "Latin")


def _pattern(names: str) -> re.Pattern[str]:
    """Finds any of the names: whole words in Latin script, beginnings of words elsewhere (cases, particles)."""
    parts = []
    for name in names.split():
        latin = re.match(f"[{_RANGES['Latin']}]", name)
        name = re.escape(name.replace("_", " "))
        parts.append(rf"(?<!\w){name}(?!\w)" if latin else name)
    return re.compile("|".join(parts))


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "\n".join(str(part.get("text") or "") for part in content or () if part.get("type") == "text")


def _question(messages: Sequence[Mapping[str, Any]]) -> str:
    return next((_text(m) for m in reversed(messages) if m.get("role") == "user"), "")
