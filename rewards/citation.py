"""Behaviour penalty `citation`: the answer has references or links that no known source confirms.

The training in the STEP3-VL report "zeros the reward" of answers with fabricated references or links. The report does
not say how fabrication is detected. The rules for finding and confirming references are reconstructions.
"""

# ruff: noqa: RUF001  # patterns match punctuation and headings of several scripts

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from rewards import Invalid, Rollout, Score, penalty
from rewards.registry import load_module
from rewards.text import visible, words_of

MAX_LENGTH = 2048  # maximum length of a URL or identifier; a longer URL or identifier is never confirmed
MAX_ENTRY = 500  # only this many characters of an entry of a reference list are compared
MAX_ASKED = 20  # maximum number of resolver calls per answer, so that no answer can cause a timeout

_URL_CHARACTERS = r"[^\s<>\"'`^{}|\\\[\]「」『』（）《》【】“”‘’«»。，；：！？、]"
_LINK = re.compile(rf"(?:https?|ftp)://{_URL_CHARACTERS}*+", re.IGNORECASE)
_BARE = re.compile(
    rf"(?<![\w.@/:%-])(?:www\.[a-z0-9-]|(?:[a-z0-9-]{{1,63}}\.){{1,6}}(?:com|org|net|edu|gov|info|io|ai|dev|eu|uk|de|fr"
    rf"|cn|jp|ru)(?::\d{{1,5}})?/){_URL_CHARACTERS}*+",
    re.IGNORECASE,
)
# Names of software, such as ASP.NET/Blazor and Socket.io/WebSockets: capital letters and no usual domain of a site
_SOFTWARE = re.compile(r"(?!www\.)(?=[^/]*[A-Z])[^/]*\.(?i:net|io|ai|dev)/", re.ASCII)
_MARKDOWN = re.compile(
    r"\]\([ ]{0,3}<?((?:[a-z0-9-]{1,63}\.){1,6}[a-z]{2,24}(?:[/?:][^\s()<>]*+)?)[>)\s]", re.IGNORECASE
)
_DOI = re.compile(
    r"(?<![\w./])(doi[\s:.]{0,3})?(10\.\d{4,9}(?:\.\d{1,5}){0,3}/[^\s\"<>{}|\\\[\]，。；、]++)", re.IGNORECASE
)
_ARXIV = re.compile(
    r"(?<!\w)arxiv[\s:./]{1,3}(\d{4}\.\d{4,5}|[a-z-]{2,12}(?:\.[a-z]{2})?/\d{7})(?:v\d{1,2})?", re.IGNORECASE
)
_ARXIV_PATH = re.compile(
    r"/(?:abs|pdf|html)/(\d{4}\.\d{4,5}|[a-z-]{2,12}(?:\.[a-z]{2})?/\d{7})(?:v\d{1,2})?(?:\.pdf)?", re.IGNORECASE
)
_TRACKING = re.compile(r"(?:utm_\w{1,20}|fbclid|gclid)=", re.IGNORECASE)

_HEADING = re.compile(
    r"^[#*_>\s\d.]{0,12}+(?:references|bibliography|sources|works cited|citations?|further reading|références|"
    r"bibliographie|literatur(?:verzeichnis)?|quellen|referencias|bibliografía|fuentes|referências|fontes|"
    r"список литературы|литература|источники|参考文献|参考资料|参考資料|引用文献|出典|참고\s?문헌|출처|"
    r"المراجع|المصادر|संदर्भ)"
    r"[*_\s]{0,4}(?:[:：][*_]{0,2}|$)",
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"^[\s>*-]{0,6}+\[(\d{1,3})\]:?\s{0,4}(.*)")
_ITEM = re.compile(r"^[\s>]{0,4}+(?:[*•-]|\(?\d{1,3}[.)])\s{1,4}(.*)")
_YEAR = re.compile(r"(?<!\d)(?:1[5-9]|20)\d\d[a-z]?(?!\d)")
_AUTHORS = re.compile(
    r"[^\W\d_][\w'’-]{1,40}(?: et al\b|,? (?:[^\W\d_]\.[ -]?){1,3})|(?:[^\W\d_]\. ?){1,3}[^\W\d_][\w'’-]{1,40}"
)
_PUBLISHED = re.compile(
    r"\bet al\b|\(\d{4}[a-z]?\)[.,:]|\b(?:journal|proceedings|conference|press|publish|verlag|éditions|retrieved)"
    r"|\b(?:vol|pp)\.|\[[MJCDR]\]|出版|学报|期刊|Изд|журнал",
    re.IGNORECASE,
)
_MARK = re.compile(r"(?:(?<=[.,;)\]。，])|(?<=[\w.,;)\]。，] ))\[(\d{1,3})\](?=[\s.,;:)\[。，]|\Z)")
_CODE_BLOCK = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)", re.DOTALL)
_CODE_SPAN = re.compile(r"`([^`\n]{1,400}+)`")
_CODE_AND_FORMULAS = re.compile(r"```.*?```|`[^`\n]{1,400}+`|\$\$[^$]{1,4000}+\$\$|\$[^$\n]{1,1000}+\$", re.DOTALL)
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Reference:
    """A reference in a text: a link, an identifier, an entry of a reference list, or a mark such as "[3]"."""

    # normalised identifier such as "doi:10.1000/182"; "mark:3" for a mark "[3]" without an entry; "" for a malformed
    # URL and for an identifier that is too long
    id: str
    host: str  # host of a URL; "doi.org" or "arxiv.org" for an identifier
    shown: str  # text for the details


@penalty("citation", timeout_s=30.0)
class Citation:
    """1.0 if the answer has a reference or link that no known source confirms, else 0.0.

    The details contain the number of references, and up to five references that are not confirmed.

    These count as references: links, DOIs, arXiv identifiers, and entries of a reference list. A link starts with a
    scheme, with "www." or with a domain before a path. The target of a markdown link also counts if it is a domain or
    a file. Under a heading such as "References", "Sources" or "参考文献", a line is an entry if it is numbered "[1]",
    or if it has a year and looks like a publication. Elsewhere, a line is an entry if it is numbered "[1]", begins with
    authors and has a year. If an entry contains a link or identifier, only this link or identifier is checked. An entry
    without a link or identifier counts as fabricated if nothing confirms it. If the answer has a heading such as
    "References", a mark such as "[3]" after a word must refer to an entry with this number. Without such a heading,
    "[3]" is not a reference, because it may be an index or a list. Program code is not checked, because its links are
    often examples: a code block, and a code span such as `curl https://...` with more than the link. Books and papers
    that are only mentioned in a sentence are not checked, and neither are names of software such as ASP.NET/Blazor.

    A reference is confirmed if it appears in the prompt's messages (of any role), in the row's ground truth, or in the
    teacher's response. (A link that teacher and policy give independently is probably not invented.) The parameters
    `allowed` and `resolver` can also confirm a reference. URLs are compared without scheme, "www.", fragment, tracking
    parameters and final slash. DOIs are compared without regard to case. arXiv identifiers are compared without their
    version. URLs with a user name, invisible characters or a malformed host are never confirmed.

    allowed   a list of domains, URLs and DOI prefixes ("10.1038"). A domain ("wikipedia.org") includes its subdomains.
              "doi.org" also allows all DOIs, and "arxiv.org" also allows all arXiv identifiers. "localhost" is possible
    resolver  `pkg.module:function` or `file.py:function` (relative to the current folder). The function takes a
              normalised reference and returns True if the reference exists. References have the form
              "https://host/path", "doi:10.1000/182", "arxiv:1706.03762" or "text:<entry of a list>". They have at most
              2,048 characters, all of them printable. The function is called at most 20 times per answer; an answer
              that needs more calls gets 1.0. For example:

                  def in_catalogue(reference: str) -> bool:
                      return reference in open("catalogue.txt").read().split("\\n")

    limit     maximum number of different references in an answer; an answer with more references gets 1.0

    Raises ValueError if the resolver does not exist. If the resolver raises an exception, the penalty raises Invalid,
    because the policy is not the cause.
    """

    def __init__(self, allowed: list[str] | None = None, resolver: str | None = None, limit: int = 200):
        if limit < 1:
            raise ValueError(f"citation: limit is {limit}; it must be 1 or more")
        self.resolver_name, self.limit = resolver, limit
        self.resolver: Callable[[str], Any] | None = None
        entries = [entry.strip() for entry in allowed or []]
        if not all(entries):
            raise ValueError(f"citation: allowed is {allowed}; its entries must be domains, URLs or DOI prefixes")
        self.doi_prefixes = tuple(e.lower() for e in entries if re.match(r"10\.\d", e))
        self.domains = {e.lower().removeprefix("www.") for e in entries if "/" not in e and not re.match(r"10\.\d", e)}
        self.urls = {_url(e, e).id for e in entries if "/" in e and not re.match(r"10\.\d", e)}
        if "" in self.urls:
            raise ValueError(f"citation: allowed is {allowed}; one of its URLs is not well-formed")

    def setup(self) -> None:
        if self.resolver_name:
            self.resolver = _imported(self.resolver_name)

    def __call__(self, rollout: Rollout) -> Score:
        answer = _without_code(_plain(rollout.answer))
        found: dict[str, Reference] = {}
        for count, reference in enumerate(references(answer, rollout.answer)):
            if count == self.limit:
                return Score(1.0, {"references": count, "why": f"more than {self.limit} references"})
            found.setdefault(reference.id or reference.shown, reference)
        if not found:
            return Score(0.0, {"references": 0})
        sources = _plain("\n".join(_sources(rollout)))
        known = {r.id for r in references(sources, sources)}
        words = f" {' '.join(_words(sources))} "
        offending, resolver_calls = [], 0
        for reference in found.values():
            kind, _, name = reference.id.partition(":")
            if not reference.id or kind == "mark":
                confirmed = bool(reference.id) and f"[{name}]" in sources
            elif reference.id in known or self.allows(reference) or (kind == "text" and f" {name} " in words):
                confirmed = True
            else:
                resolver_calls += 1
                confirmed = resolver_calls <= MAX_ASKED and self.resolves(reference.id)
            if not confirmed:
                offending.append(reference.shown)
            if len(offending) == 5:
                break
        return Score(float(bool(offending)), {"references": len(found), "offending": offending})

    def allows(self, reference: Reference) -> bool:
        """True if an entry of `allowed` covers the reference. The reference must be well-formed."""
        if reference.id in self.urls:
            return True
        if reference.id.startswith("doi:") and self.doi_prefixes:
            doi = reference.id.removeprefix("doi:")
            # the prefix "10.1038" does not cover 10.10385
            if any(doi.startswith(p if "/" in p else f"{p}/") for p in self.doi_prefixes):
                return True
        labels = reference.host.split(".")
        return any(".".join(labels[i:]) in self.domains for i in range(len(labels)))

    def resolves(self, identifier: str) -> bool:
        """True if the resolver says that the reference exists. Always False without a resolver."""
        argument = _resolver_argument(identifier)
        if self.resolver is None or argument is None:
            return False
        try:
            return bool(self.resolver(argument))
        except Exception as e:  # the resolver's own code may raise anything
            raise Invalid(f"resolver {self.resolver_name} failed: {type(e).__name__}: {e}") from e


def references(text: str, original: str) -> Iterator[Reference]:
    """Yields the links, identifiers and list entries of a text. Equal references are yielded only once.

    `text` is `original` without invisible characters. A URL that has invisible characters in `original` counts as
    malformed: `text` contains the URL, but `original` does not.
    """
    bare = [m[0] for m in _BARE.finditer(text) if not _SOFTWARE.match(m[0])]
    found = [*(m[0] for m in _LINK.finditer(text)), *bare]
    for url in dict.fromkeys([*found, *(m[1] for m in _MARKDOWN.finditer(text))]):
        yield _url(url, original)
    yield from dict.fromkeys(_identifiers(text))
    yield from dict.fromkeys(_listed(text))


def _identifiers(text: str) -> Iterator[Reference]:
    for match in _DOI.finditer(text):
        doi = _trimmed(match[2]).lower()
        suffix = doi.partition("/")[2]
        # A text such as 10.2500/4 may be a quotient, so it counts as a DOI only if "doi" stands before it.
        if suffix[:1].isalnum() and (match[1] or len(suffix) > 5 or re.search(r"[a-z]", suffix)):
            yield _doi(doi)
    for match in _ARXIV.finditer(text):
        yield _arxiv(match[1])


def _url(url: str, original: str) -> Reference:
    shown = _trimmed(url)
    malformed = Reference("", "", shown[:200])
    if len(shown) > MAX_LENGTH or shown not in original:
        return malformed
    address = shown.replace("&amp;", "&")
    try:
        parts = urlsplit(address if "://" in address[:8] else f"http://{address}")
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:  # a malformed address or port
        return malformed
    if "@" in parts.netloc or "%" in parts.netloc or not re.fullmatch(r"localhost|[\w-]{1,63}(?:\.[\w-]{1,63})+", host):
        return malformed
    host = host.removeprefix("www.")
    path = unquote(parts.path).rstrip("/")
    if host in ("doi.org", "dx.doi.org") and path.startswith("/10."):
        return _doi(path[1:].lower())
    if host in ("arxiv.org", "export.arxiv.org") and (paper := _ARXIV_PATH.fullmatch(path)):
        return _arxiv(paper[1])
    query = "&".join(one for one in parts.query.split("&") if one and not _TRACKING.match(one))
    named_port = f":{port}" if port not in (None, 80, 443) else ""
    return Reference(f"https://{host}{named_port}{path}{'?' if query else ''}{query}", host, shown[:200])


def _doi(doi: str) -> Reference:
    if doi.startswith("10.48550/arxiv."):
        return _arxiv(re.sub(r"v\d{1,2}$", "", doi.removeprefix("10.48550/arxiv.")))
    return Reference(f"doi:{doi}" if len(doi) <= MAX_LENGTH else "", "doi.org", f"doi:{doi}"[:200])


def _arxiv(paper: str) -> Reference:
    return Reference(f"arxiv:{paper.lower()}", "arxiv.org", f"arxiv:{paper}"[:200])


def _trimmed(link: str) -> str:
    """Removes punctuation at the end of a link. Also removes a closing bracket whose opening bracket is not in the
    link."""
    link = link[: MAX_LENGTH + 1]
    while link and (link[-1] in ".,;:!?*_~'\"" or (link[-1] == ")" and link.count("(") < link.count(")"))):
        link = link[:-1]
    return link


def _listed(text: str) -> Iterator[Reference]:
    """Yields each list entry that contains no link or identifier, and each mark such as "[3]" that refers to no
    entry."""
    # listing: True after a heading such as "Sources", until another heading (a line that starts with "#") follows
    # headed: True after the first heading such as "Sources", until the end of the text
    listing, headed = False, False
    numbers: set[str] = set()
    prose: list[str] = []
    for whole in text.split("\n"):
        line = whole[: 4 * MAX_ENTRY]
        if heading := _HEADING.match(line):
            listing = headed = True
            line = line[heading.end() :]
        elif line.lstrip().startswith("#"):
            listing = False
        numbered, item = _NUMBERED.match(line), line
        if numbered:
            item = numbered[2]
        elif bullet := _ITEM.match(line):
            item = bullet[1]
        if not _is_entry(item, bool(numbered), listing):
            prose.append(line)
            continue
        if numbered:
            numbers.add(numbered[1])
        if not any(pattern.search(item) for pattern in (_LINK, _BARE, _MARKDOWN)) and not any(_identifiers(item)):
            words = " ".join(_words(item))[:MAX_ENTRY].strip()
            yield Reference(f"text:{words}" if words else "", "", line.strip()[:200])
    if headed:
        for mark in _MARK.finditer(_CODE_AND_FORMULAS.sub(" ", "\n".join(prose))):
            if mark[1] not in numbers:
                yield Reference(f"mark:{mark[1]}", "", f"[{mark[1]}]")


def _is_entry(item: str, numbered: bool, listing: bool) -> bool:
    """True if a line is an entry of a reference list.

    A line under a heading such as "Sources" is an entry if it is numbered "[1]", or if it has a year and looks like a
    publication. Elsewhere, a line is an entry if it is numbered "[1]", begins with authors and has a year. The reason
    for these conditions: a line may also be an item of another list, or a numbered step of a solution.
    """
    if numbered and listing:
        return bool(item.strip())
    if not _YEAR.search(item):
        return False
    authors = _AUTHORS.match(item.lstrip("*_ ")) is not None
    return (authors or _PUBLISHED.search(item) is not None) if listing else (numbered and authors)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _plain(text: str) -> str:
    """Removes invisible characters and lone surrogates. Converts full-width letters, periods and slashes to ASCII, and
    also a full-width colon before "//"."""
    plain = visible(text).translate({0xFF0E: ".", 0xFF0F: "/"} | {0xFF21 + i: 0x41 + i for i in range(58)})
    return plain.replace("：//", "://")


def _without_code(text: str) -> str:
    """Removes code blocks, and code in a line. A code span that is only a link or a word stays."""
    text = _CODE_BLOCK.sub(" ", text)
    return _CODE_SPAN.sub(lambda span: " " if re.search(r"[\s\"'(){};=]", span[1]) else span[0], text)


def _sources(rollout: Rollout) -> Iterator[str]:
    """Yields the texts of the row. A reference is confirmed if one of these texts contains it."""
    yield from map(words_of, rollout.prompt.messages)
    yield rollout.prompt.reference or ""
    truth = rollout.prompt.ground_truth
    yield truth if isinstance(truth, str) else ""


def _resolver_argument(identifier: str) -> str | None:
    """Converts an identifier to the resolver's argument. Returns None if the argument is too long or has unprintable
    characters."""
    if not identifier.startswith("https://"):
        return identifier if identifier.isprintable() and len(identifier) <= MAX_LENGTH else None
    host, slash, rest = identifier.removeprefix("https://").partition("/")
    try:
        address = f"https://{host.encode('idna').decode()}{slash}{quote(rest, safe='/?&=:+,;@~!$()*-._')}"
    except UnicodeError:
        return None
    return address if len(address) <= MAX_LENGTH else None


def _imported(target: str) -> Callable[[str], Any]:
    place, _, name = target.rpartition(":")
    try:
        function = getattr(load_module(place, Path()), name, None)
    except ValueError as e:
        raise ValueError(f"citation: resolver {target!r}: {e}") from e
    if not callable(function):
        raise ValueError(f"citation: resolver {target!r}: {place} has no function {name!r}")
    return function
