"""Tests the penalty `citation`: which references and links count as fabricated."""

# ruff: noqa: RUF001  # look-alike letters and headings in several scripts

import importlib
from pathlib import Path
from typing import Any

import pytest

from rewards import Invalid, Rollout, Score, get
from rewards.citation import MAX_ASKED
from rl.types import Prompt
from tests.support.patience import at_most

HALF = 1 << 19  # number of characters of a hostile text
QUESTION = "Compare with https://Example.org/Report?id=7, doi:10.1000/ABC.5 and arXiv:1706.03762v2, please."


def offence(answer: str, question: str = QUESTION, prompt: dict[str, Any] | None = None, **params: Any) -> Score:
    messages = ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},)
    score = get("citation", params)(Rollout(Prompt("row-1", "chat", messages, **(prompt or {})), answer))
    assert isinstance(score, Score)
    return score


FABRICATED = {
    "link": "See https://made-up.com/paper.",
    "link without scheme": "See www.made-up.com.",
    "domain with a path": "See made-up.com/paper.",
    "markdown link": "See [the paper](https://made-up.com/paper).",
    "markdown link without scheme": "See [the paper](made-up.io).",
    "picture": "![plot](plot.png)",
    "link in Chinese text": "参见https://made-up.com/论文。",
    "link as a code span": "See `https://made-up.com/paper`.",
    "full-width link": "See ｈｔｔｐｓ：／／made-up.com now",
    "link with hidden characters": "See ht\u200btps://made-up.com",
    "malformed link": "See http://[::1",
    "doi": "It is known (doi: 10.1234/made.up).",
    "bare doi": "It is known, 10.1038/s41586-020-1234-5.",
    "doi link": "It is known: https://doi.org/10.1234/made.up",
    "arxiv": "It is known [arXiv:2401.01234].",
    "old arxiv": "It is known, arxiv: hep-th/9901001.",
    "reference list": "It is so [1].\n\n## References\n[1] Smith, A. Shapes and their sides. 2011.",
    "bulleted list": "It is so.\n\n**References:**\n- Smith, A. (2011). Shapes and their sides.\n",
    "numbered list": "It is so.\n\nSources:\n1. Smith et al., Shapes and their sides, 2011",
    "chinese list": "如上所述。\n\n参考文献\n[1] 王明. 图形与边[M]. 北京: 某出版社, 2010.",
    "russian list": "Это так.\n\nСписок литературы:\n1. Иванов А. Б. Фигуры. Изд. дом, 2010.",
    "german list": "So ist es.\n\nLiteratur\n- Schmidt, A. (2011). Formen und Seiten.",
    "list without a heading": "It is so [1].\n\n[1] Smith, A. Shapes and their sides. 2011.",
    "mark that has no entry": "It is so [1], and more so [2].\n\nReferences\n[1] https://example.org/report?id=7",
    "list without entries": "It is so. [1], [2]\n\nSources: several",
}

ORDINARY = {
    "nothing": "",
    "no references": "The area is half of the base times the height, so 12.",
    "list": "The roots are [3] and the list is [1, 2, 3]; a[3] is 5.",
    "interval": "x lies in [0, 1] and f[1](x) = [2](3) = 6 [3].",
    "quotient": "So 10.5000/2 = 5.25 and 10.1234/5 is 2.02468.",
    "units": "It runs at 5 km/h, i.e./or about 1.4 m/s.",
    "numbered steps": "[1] In 2020 there were 5 apples.\n[2] Then 1999 were added.\n",
    "steps": "1. Let n = 2010.\n2. Then n/2 = 1005.\n",
    "energy sources": "Sources:\n- wind, 30% in 2020\n- sun, 20% in 2020\n\nTogether 50%.",
    "domain by name": "The site example.com is a placeholder.",
    "mail": "Write to someone@www.made-up.com.",
    "section link": "See [above](#section).",
    "formula": r"$$\sum_{k=1}^{n} a[k] = \frac{n}{2}$$ and \[ [1], [2] \]",
    "year": "In 1905 Einstein explained the photoelectric effect (see his paper).",
}

GIVEN = {
    "other spelling": "See http://www.example.ORG:80/Report/?utm_source=x&id=7#part.",
    "markdown": "See [it](<https://example.org/Report?id=7>), (https://example.org/Report?id=7).",
    "doi": "DOI 10.1000/abc.5, https://dx.doi.org/10.1000/Abc.5",
    "arxiv": "arXiv:1706.03762, https://arxiv.org/pdf/1706.03762v5.pdf, doi:10.48550/arXiv.1706.03762",
    "entry with a given link": "So it is [1].\n\nReferences\n[1] A report, 2019. https://example.org/Report?id=7",
}


@pytest.mark.parametrize("kind", FABRICATED)
def test_an_unconfirmed_reference_offends_and_is_in_the_details(kind: str) -> None:
    score = offence(FABRICATED[kind])
    assert score.value == 1.0
    assert score.details["offending"]


@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_text_has_no_references(kind: str) -> None:
    assert offence(ORDINARY[kind]) == Score(0.0, {"references": 0})


@pytest.mark.parametrize("kind", GIVEN)
def test_references_of_the_prompt_may_be_cited_in_any_spelling(kind: str) -> None:
    score = offence(GIVEN[kind])
    assert (score.value, score.details["offending"]) == (0.0, [])


@pytest.mark.parametrize("answer", ["https://example.org/Report?id=8", "https://example.org", "doi:10.1000/abc.6"])
def test_a_reference_similar_to_one_of_the_prompt_offends(answer: str) -> None:
    assert offence(answer).value == 1.0


def test_numbered_documents_and_titles_of_the_prompt_may_be_cited() -> None:
    question = "Use these.\n[1] Smith, A. Shapes and their sides. 2011.\n[2] Other text."
    answer = "It is so [1], and also [2].\n\nReferences\n[1] Smith A, *Shapes and their sides*, 2011"
    assert offence(answer, question).value == 0.0
    assert offence(answer.replace("2011", "2012"), question).details["offending"]


@pytest.mark.parametrize("given", [{"reference": "see https://made-up.com"}, {"ground_truth": "http://made-up.com/"}])
def test_references_of_the_teacher_or_the_ground_truth_may_be_cited(given: dict[str, str]) -> None:
    assert offence("https://made-up.com", prompt=given).value == 0.0


def test_reasoning_is_not_judged() -> None:
    assert offence("<think>https://made-up.com</think>It is 5.").value == 0.0


ALLOWED = ["wikipedia.org", "10.1038", "https://made-up.com/a/", "arxiv.org"]


@pytest.mark.parametrize(
    "answer",
    [
        "https://wikipedia.org",
        "https://en.wikipedia.org/wiki/Triangle_(geometry).",
        "https://fr.wikipedia.org/wiki/%C3%89tat",
        "\u200fhttps://ar.wikipedia.org/wiki/مثلث\u200f",
        "doi:10.1038/171737a0",
        "http://www.made-up.com/a",
        "arXiv:2401.01234",
    ],
)
def test_allowed_domains_urls_and_prefixes_do_not_offend(answer: str) -> None:
    score = offence(answer, allowed=ALLOWED)
    assert (score.value, score.details["references"]) == (0.0, 1)


@pytest.mark.parametrize(
    "answer",
    [
        "https://wikipedia.org.evil.com/wiki",
        "https://wikipedia.org@evil.com/wiki",
        "https://evil.com@wikipedia.org/wiki",
        "https://evilwikipedia.org",
        "https://wikipediа.org",  # the last letter of "wikipedia" is Cyrillic
        "https://xn--wikipedi-86g.org",
        "https://wiki\u200bpedia.org/wiki",
        "https://wikipedia.org\u200b.evil.com",
        "https://wikipedia.org%2eevil.com",
        "https://wikipedia.org:99999/",
        "https://evil.com/wikipedia.org",
        "https://evil.com?wikipedia.org",
        "https://made-up.com/ab",
        "doi:10.10385/171737a0",
        "https://doi.org@evil.com/10.1038/171737a0",
    ],
)
def test_look_alikes_of_allowed_references_offend(answer: str) -> None:
    assert offence(answer, allowed=ALLOWED).value == 1.0


def test_allowing_the_arxiv_or_doi_site_allows_its_identifiers() -> None:
    assert offence("doi:10.1234/made.up", allowed=["doi.org"]).value == 0.0
    assert offence("doi:10.1234/made.up", allowed=["arxiv.org"]).value == 1.0


@pytest.mark.parametrize("params", [{"allowed": [""]}, {"allowed": ["http://[/x"]}, {"limit": 0}])
def test_invalid_parameters_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"citation: (allowed|limit) is"):
        offence("", **params)


# The parameter `resolver`


RESOLVER = """
asked = []

def knows(reference: str) -> bool:
    asked.append(reference)
    return reference.startswith(("https://real.com", "doi:10.5555/", "text:smith"))

def breaks(reference):
    raise ConnectionError("no network")
"""


@pytest.fixture
def resolver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    tmp_path.joinpath("resolver_of_tests.py").write_text(RESOLVER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return "resolver_of_tests.py"


def test_a_resolver_confirms_references_that_nothing_else_confirms(resolver: str) -> None:
    answer = "https://real.com/x, doi:10.5555/1x\n\nReferences\n- Smith, A. (2011). Shapes."
    assert offence(answer, resolver=f"{resolver}:knows").value == 0.0
    score = offence(answer + "\n\nhttps://unreal.com", resolver=f"{resolver}:knows")
    assert (score.value, score.details["offending"]) == (1.0, ["https://unreal.com"])


def test_a_resolver_is_found_by_module_and_gets_short_normalised_printable_text(resolver: str) -> None:
    answer = "https://WWW.Real.com/é/?utm_x=1#y https://a@real.com https://é.com/" + "x" * 3000
    offence(answer + " https://real.com/" + "é" * 700, resolver="resolver_of_tests:knows")
    asked = importlib.import_module("resolver_of_tests").asked
    assert asked == ["https://real.com/%C3%A9"]


def test_a_resolver_that_fails_makes_the_sample_invalid(resolver: str) -> None:
    with pytest.raises(Invalid, match=r"resolver .*breaks failed: ConnectionError: no network"):
        offence("https://real.com", resolver=f"{resolver}:breaks")
    assert offence("no link", resolver=f"{resolver}:breaks").value == 0.0


def test_a_resolver_is_called_at_most_twenty_times_per_answer(resolver: str) -> None:
    links = [f"https://real.com/{i}" for i in range(MAX_ASKED + 1)]
    assert offence(" ".join(links[:-1]), resolver=f"{resolver}:knows").value == 0.0
    assert offence(" ".join(links), resolver=f"{resolver}:knows").details["offending"] == links[-1:]


@pytest.mark.parametrize("target", ["absent.py:f", "no_such_module:f", "resolver_of_tests.py:absent", "f"])
def test_a_missing_resolver_is_named_in_the_error(resolver: str, target: str) -> None:
    with pytest.raises(ValueError, match=f"resolver '{target}'"):
        offence("", resolver=target)


# Limits


def test_more_references_than_the_limit_are_an_offence_even_if_allowed() -> None:
    links = " ".join(f"https://en.wikipedia.org/{i}" for i in range(201))
    score = offence(links, allowed=["wikipedia.org"])
    assert (score.value, score.details["why"]) == (1.0, "more than 200 references")
    assert offence(links, allowed=["wikipedia.org"], limit=201).value == 0.0
    assert offence("https://en.wikipedia.org/1 " * 500, allowed=["wikipedia.org"]).value == 0.0


HOSTILE = {
    "one link": "https://" + "a." * (HALF // 2),
    "many links": "http://a.b/ " * (HALF // 12),
    "different links": " ".join(f"http://a.b/#{i}" for i in range(HALF // 16)),
    "closing brackets": "http://a.b/" + ")" * HALF,
    "links of brackets": ("http://a.b/" + ")" * 2000 + " ") * (HALF // 2012),
    "schemes": "http://" * (HALF // 7),
    "labels": "a." * (HALF // 2),
    "long label": "a" * HALF + ".com/",
    "markdown": "[](" * (HALF // 3),
    "markdown labels": "](a.a.a.a.a.a.a." * (HALF // 16),
    "registrants": "10.1000" * (HALF // 7),
    "dois": "doi:" * (HALF // 4),
    "arxiv": "arxiv:" * (HALF // 6),
    "marks": "a [1]. " * (HALF // 7) + "\nReferences\n",
    "headings": "References\n" * (HALF // 11),
    "entries": "References\n" + "[1] Smith 2011\n" * (HALF // 15),
    "fences": "References\n" + "```" * (HALF // 3),
    "dollars": "References\n" + "$" * HALF,
    "authors": "References\n" + "A. " * (HALF // 3),
    "hashes": "#" * HALF,
    "blanks": " " * HALF,
    "new lines": "\n" * HALF,
    "null bytes": "http://a\0.b" * (HALF // 11),
    "right to left": "\u202e\u200f" * (HALF // 2),
    "surrogates": "http://\ud800" * (HALF // 8),
    "percent": "http://a.b/" + "%" * 2000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_text_is_scored_in_bounded_time(kind: str) -> None:
    with at_most(5):
        score = offence(HOSTILE[kind])
    assert score.value in (0.0, 1.0)
    assert len(str(score.details)) < 3000


@pytest.mark.parametrize(
    "answer",
    [
        "```\ncurl https://made-up.com/a\n```",
        '```html\n<a href="https://made-up.com">\n',
        "Run `curl https://made-up.com/a` first.",
        "Node.js/Express serve pages; Socket.io/WebSockets push events; ASP.NET/Blazor too.",
    ],
)
def test_links_in_code_and_names_of_software_are_no_references(answer: str) -> None:
    assert offence(answer).value == 0.0


def test_a_local_address_counts_unless_it_is_allowed() -> None:
    answer = "Open http://localhost:5000/start in a browser."
    assert (offence(answer).value, offence(answer, allowed=["localhost"]).value) == (1.0, 0.0)
