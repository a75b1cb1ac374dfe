"""Tests the reward `math_verify` with ground truths from data sets, and with answers that are right or wrong."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from rewards import Invalid, Rollout, get
from rewards.running.runner import RewardRunner
from rl.config import RewardSpec
from rl.types import Prompt
from tests.support.reward_samples import HOSTILE, assert_lowest_soon

MATHS = get("math_verify")


def rollout(text: str, truth: Any) -> Rollout:
    return Rollout(Prompt("row-7", "math", (), ground_truth=truth), text)


def score(text: str, truth: Any) -> float:
    return float(MATHS(rollout(text, truth)).value)


TRUTHS = [
    *("8", "-17", "+6", "1024", "3.75", ".25", "0.040", "1,250", "12{,}500", r"7,\!350,\!000", "1e3", 41, 2.5),
    *(r"\frac{5}{12}", r"\frac58", r"-\dfrac{2}{7}", r"\tfrac{9}{4}", "7/16", r"3\frac{1}{5}", "4 2/3"),
    *(r"6\sqrt{7}", r"6\sqrt7", r"\frac{2\sqrt{5}}{3}", r"\sqrt[3]{4}", r"\frac{\pi}{8}", "9\\pi", "36π", "4√5", "y²"),
    *(r"0.\overline{27}", r"1.1\overline{6}", r"2.4 \times 10^{5}", "2^{2024}", r"7^{-9}", "30!", r"\binom{16}{4}"),
    *("4 - 3i", "2a-7", "x^3-2x^2+9", r"(t+4)(t-1)", r"\tan y", r"\ln 3", r"\log_3 5", r"e^{-2}", r"\sin^2 x"),
    *("x=6", "y = 3x - 4", r"f(x) = x^2 + 1", r"x^2 + y^2 = 25", "k > 7", r"-2 \le x < 9", r"z \ne 0", "n = 2, 5"),
    *("(4,-1)", r"\left( 2, \frac{\pi}{3} \right)", "(1, 2, 9)", "[0,6)", r"(-\infty, 8]", r"(1,3) \cup [5,\infty)"),
    *(r"\{2, 4, 9\}", "2, 4, 9", "6,-6", r"\pm 6", r"2 \pm \sqrt{3}", r"\emptyset", r"\{1\}", "7 \\text{ and } 9"),
    *(r"\begin{pmatrix} 2 \\ -7 \end{pmatrix}", r"\begin{bmatrix} 1 & 0 \\ 4 & 1/2 \end{bmatrix}"),
    *("35%", r"35\%", r"12.5\%", r"130^\circ", r"60^{\circ}", "75°", r"\$9", r"\$14.50", r"\$2,400"),
    *(r"18\text{ cm}", r"18 \text{ cm}^2", r"6\,\mathrm{m/s}", "25 minutes", r"40\text{ square feet}"),
    *("417_9", "1101_{2}", "3B_{16}", "5:45", "11:20 p.m.", r"7:05\text{ a.m.}", "4:9", "4 : 9"),
    *("A", "D", "(C)", r"\text{B}", r"\text{(E)}", r"\textbf{(D)}", r"\mathrm{A}", "E", "I"),
    *("Priya", r"\text{Priya}", r"\text{odd}", "Yes", "no", "False", "rectangle", r"\text{no real roots}", "May 14"),
    *(
        "south-west",
        r"\triangle PQR",
        r"\angle DEF",
        "XY",
        r"\overline{XY}",
        "#### 31",
        r"\boxed{31}",
        r"$\frac{3}{8}$",
    ),
]


@pytest.mark.parametrize("truth", TRUTHS, ids=str)
def test_a_ground_truth_scores_one_against_itself(truth: Any) -> None:
    stated = str(truth).strip("$")
    texts = [
        f"So it is \\boxed{{{stated}}}.",
        f"Hence \\boxed{{{stated.removesuffix('.')}.}}",
        f"Answer: {stated}",
        stated,
    ]
    if "\\$" not in stated and "boxed" not in stated:
        texts += [f"The answer is ${stated}$.", f"We get\n\\(\\boxed{{{stated}}}\\)", f"\\boxed{{${stated}$}}"]
    assert {text: score(text, truth) for text in texts} == dict.fromkeys(texts, 1.0)


EQUAL = {
    r"\frac{5}{12}": [r"\dfrac{5}{12}", r"\tfrac{5}{12}", r"\frac{10}{24}", "5/12", r"\frac{5}{12}.", r"\frac 5 {12}"],
    r"3\frac{1}{5}": [r"\frac{16}{5}", "3.2", "3 1/5", "16/5"],
    "4 2/3": [r"\frac{14}{3}", r"4\frac{2}{3}"],
    "8": [
        "8.",
        "8.0",
        "08",
        "x=8",
        "x = 8.00",
        r"8\text{ cm}",
        r"8\,\text{cm}^2",
        "8 apples",
        r"\$8",
        "$8",
        "+8",
        "8%",
    ],
    "130": [r"130^\circ", "130°", r"130\text{ degrees}", r"\mathbf{130}", r"\text{130}", r"\bm{130}."],
    "x=6": ["6", "6 = x", "6.0"],
    "y = 3x - 4": ["3x-4", "y=-4+3x", "y - 3x = -4"],
    "12500": ["12,500", "12{,}500", r"12\,500", r"12,\!500", r"\$12,500", r"1.25 \times 10^4"],
    "1,250": ["1250", "1250.0"],
    r"35\%": ["35", "35%", "0.35", r"\frac{7}{20}", "35 percent", r"35\text{ percent}"],
    "0.35": ["35%", r"35\%", ".35", r"\frac{7}{20}"],
    r"\$14.50": ["14.5", "14.50", r"\frac{29}{2}"],
    r"0.\overline{27}": [r"\frac{3}{11}", r"\frac{27}{99}"],
    r"\frac{1}{3}": [r"0.\overline{3}", r"\frac{1}{3}\text{ m}"],
    r"6\sqrt{7}": [r"\sqrt{252}", r"6 \sqrt7", "6√7", r"\mathbf{6\sqrt{7}}", r"6\cdot\sqrt{7}"],
    r"9\pi": ["9π", r"\pi \cdot 9", r"9 \pi."],
    "4 - 3i": ["-3i+4", r"\mathrm{4-3i}", "4-3i."],
    r"(t+4)(t-1)": ["t^2+3t-4", "(t-1)(t+4)", r"\text{(t+4)(t-1)}"],
    "(4,-1)": [r"\left(4, -1\right)", "( 4 , -1 )", "(4,-1).", "(4.0, -1)"],
    "[0,6)": [r"\left[0, 6\right)", r"0 \le x < 6"],
    r"[5,\infty)": [r"x \geq 5", r"\left[5,\infty\right)", "[5, ∞)"],
    r"(1,3) \cup [5,\infty)": [r"[5, \infty) \cup (1, 3)"],
    r"\{2, 4, 9\}": ["9, 4, 2", r"\left\{4,2,9\right\}", "2, 4, 9", "2, 4 and 9", r"2, 4, \text{ and } 9"],
    "6,-6": [r"\pm 6", "-6, 6", r"x=6 \text{ or } x=-6"],
    r"\emptyset": [r"\varnothing", r"\{\}"],
    r"\begin{pmatrix} 2 \\ 1/2 \end{pmatrix}": [
        r"\begin{bmatrix} 2 \\ 0.5 \end{bmatrix}",
        r"\begin{pmatrix}2\\\frac{1}{2}\end{pmatrix}",
    ],
    "417_9": ["417_{9}", "(417)_9", "417_9.", "417"],
    "5:45": ["5:45.", r"\text{5:45}", "5 : 45"],
    "11:20 p.m.": ["11:20 PM", r"11:20\text{ p.m.}", "11:20 p.m", "11:20pm"],
    "B": ["(B)", "B.", r"\text{B}", r"\text{(B)}", r"\textbf{(B)}", r"\mathbf{B}", r"\mathrm{(B)}."],
    r"\textbf{(D)}": ["D", "(D)", r"\text{D}"],
    "Priya": [r"\text{Priya}", "priya", r"\textbf{Priya}.", r"\text{PRIYA}"],
    r"\text{odd}": ["odd", "Odd", r"\mathrm{odd}", "odd."],
    "Yes": ["yes", "Yes.", r"\text{Yes}", "YES"],
    r"\text{no real roots}": ["no real roots", r"\text{No real roots.}"],
    "2^{2024}": [r"4^{1012}", r"2 \cdot 2^{2023}"],
    "720": ["6!", r"\binom{10}{3} \cdot 6"],
}


@pytest.mark.parametrize(("truth", "answer"), [(truth, one) for truth, equal in EQUAL.items() for one in equal])
def test_other_notations_of_a_ground_truth_score_one(truth: str, answer: str) -> None:
    assert score(f"I add them up and get $3$.\n\nSo the result is \\boxed{{{answer}}}.", truth) == 1.0


WRONG = {
    r"\frac{5}{12}": [r"\frac{12}{5}", "5, 12", "0.4", r"\frac{5}{12}, 1"],
    r"3\frac{1}{5}": ["0.6", "3, 1/5"],
    "4 2/3": [r"\frac{8}{3}", "4, 2/3"],
    "8": ["-8", "8, 9", "80", "8!", "0.8", "x", r"\frac{8}{0}", "8_9 + 1", "800", ""],
    r"35\%": ["3.5", "0.0035", "34%", "0.35%", "3500", "65"],
    "0.35": ["3.5%", "350%"],
    "1,250": ["1, 250", "250", "1.25"],
    "12500": ["12, 500", "12.5"],
    r"0.\overline{27}": ["0.27", r"0.\overline{72}"],
    "417_9": ["417_8", "417_{10}", "471_9", "347"],
    "5:45": ["5:54", "6:45"],
    "11:20 p.m.": ["11:20 a.m.", "11:20 AM", "11:02 p.m."],
    "(4,-1)": ["(-1,4)", "(4,1)", "[4,-1)", "4"],
    "[0,6)": ["(0,6)", "[0,6]", r"0 \le x \le 6"],
    r"\{2, 4, 9\}": ["2, 4", "2, 4, 9, 11", "15"],
    r"\begin{pmatrix} 2 \\ 1/2 \end{pmatrix}": [r"\begin{pmatrix} 1/2 \\ 2 \end{pmatrix}"],
    "x=6": ["y=6", "7"],
    "k > 7": ["k < 7", r"k \ge 7", "7"],
    "B": ["A", "(C)", "A, B", "AB", r"\text{(D)}"],
    "Priya": ["Payri", "Maria", "Priya or Maria"],
    r"\text{live}": ["evil", r"\text{vile}", "veil"],
    r"\text{odd}": ["even", "not odd", "dod"],
    "no": ["yes", "on"],
    "2^{2024}": ["2^{2023}", "2024"],
    "30!": ["29!", "31!"],
}


@pytest.mark.parametrize(("truth", "answer"), [(truth, one) for truth, wrong in WRONG.items() for one in wrong])
def test_wrong_answers_score_zero(truth: str, answer: str) -> None:
    assert score(f"So the result is \\boxed{{{answer}}}.", truth) == 0.0


ENDLESS = [
    *("9^{9^{9^9}}", "7^{8^{9}}", r"2^{2^{2^{2^{2}}}}", "10^{10^{10}}", r"6^{-6^{6^{6}}}", "2.5^{2.5^{2.5^{25}}}"),
    *("400000!", "((6!)!)!", "6!!!", "1" * 300 + "!", r"\binom{800000}{300000}", r"\binom{10^8}{4000}"),
    *(r"{900000 \choose 400000}", r"\gcd(8^{8^9}, 6)", r"\sum_{k=1}^{10^{12}} \frac{1}{k}", r"\prod_{n=2}^{10^7} n"),
    *("(x+1)^{3000}", "(a+b+c)^{60}", r"(2+\sqrt{3})^{5000}", "(5+2i)^{900}"),
    *("x = 9^{9^9}", "(3, 9^{9^9})", r"\{1, 9^{9^9}\}", r"\begin{pmatrix} 1 \\ 9^{9^9} \end{pmatrix}", r"9^{9^9}\%"),
    *(r"\frac{1}{9^{9^9}}", r"\sqrt{9^{9^9}}", r"\sin(9^{9^9})", r"|9^{9^9}|", r"\text{9^{9^9}}", "t < 9^{9^9}"),
    *(r"\frac{1}{" * 30 + "2" + "}" * 30, "(" * 40 + "2" + ")" * 40, "3" * 2500),
]


@pytest.mark.parametrize("truth", ENDLESS)
def test_a_ground_truth_that_takes_too_long_to_compare_makes_the_row_invalid(truth: str) -> None:
    start = time.process_time()
    for answer in ("5", truth[:50]):
        with pytest.raises(Invalid, match="ground truth of row row-7"):
            score(f"\\boxed{{{answer}}}", truth)
    assert time.process_time() - start < 5.0


@pytest.mark.parametrize(
    "truth",
    [
        *(
            "2^{2024}",
            "10^{100}",
            "3^{3^{3}}",
            "2^{2^{2^{2}}}",
            "10^{-9}",
            "e^{-1/2010}",
            r"\frac{1}{2^{2007}}",
            "100!",
        ),
        *("(x+1)^{20}", "x^{2000}-1", r"\binom{2n}{n}", r"\binom{10}{3}\left(\frac{1}{2}\right)^{10}", r"2^n \cdot n!"),
        *(r"\sum_{k=1}^{100} k^2", r"\sum_{k=1}^{\infty} \frac{1}{k^2}", r"\sqrt{2+\sqrt{2+\sqrt{2}}}", r"x^{1/3}"),
        r"6.02 \times 10^{23}",
    ],
)
def test_large_ground_truths_that_can_be_evaluated_are_accepted(truth: str) -> None:
    assert (score(f"\\boxed{{{truth}}}", truth), score(r"\boxed{-5}", truth)) == (1.0, 0.0)


@pytest.fixture(scope="module")
def runner() -> Iterator[RewardRunner]:
    with RewardRunner({"math": [RewardSpec(use="math_verify", timeout_s=3.0, memory_mb=1024)]}, workers=1) as made:
        made.start().result()
        yield made


def test_an_answer_that_takes_too_long_scores_zero_and_such_a_ground_truth_makes_the_row_invalid(
    runner: RewardRunner,
) -> None:
    tower = "9^{9^{9^9}}"
    of_the_text, of_the_row = runner.score([rollout(f"\\boxed{{{tower}}}", "5"), rollout(r"\boxed{5}", tower)])
    assert (of_the_text.reward, of_the_text.invalid) == (0.0, None)
    assert "the answer leads to a number of more than" in of_the_text.details["why"]
    assert "ground truth of row row-7 leads to a number of more than" in (of_the_row.invalid or "")


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        (r"<think>2?</think>So \(x = 3\), \boxed{\frac{1}{2}}.", "0.5"),
        (r"\boxed{0.5}", r"\frac{2}{4}"),
        (r"3 + 4 = 7" + "\nAnswer: 7", 7),
        (r"Answer: 2\sqrt{3}", r"\sqrt{12}"),
        (r"3\sqrt{13}", r"3\sqrt{13}"),
        (r"The result is $\frac{\pi}{2}$.", r"\boxed{\pi/2}"),
        (r"\boxed{(3, \pi)}", r"$\left( 3, \pi \right)$"),
        (r"\boxed{10:30 a.m.}", "10:30 A.M."),
        (r"\boxed{x=5}", "5"),
    ],
)
def test_equal_mathematics_scores_one(text: str, truth: Any) -> None:
    assert score(text, truth) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no idea",
        r"\boxed{}",
        r"\boxed{6}",
        r"5 \boxed{6}",
        r"\boxed{5, 6}",
        r"\boxed{\frac{5}{",
        r"\boxed{nan}",
    ],
)
def test_an_answer_without_the_true_result_scores_zero(text: str) -> None:
    assert score(text, "5") == 0.0


@pytest.mark.parametrize("truth", ["", None, r"\frac{1}{", "}{", {"x": 1}])
def test_a_ground_truth_that_does_not_parse_makes_the_row_invalid(truth: Any) -> None:
    with pytest.raises(Invalid, match="row-7"):
        score(r"\boxed{5}", truth)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_megabytes_of_hostile_text_score_zero_within_two_seconds(text: str) -> None:
    assert_lowest_soon("math_verify", "5", text)
