"""Tests the penalty `language_consistency`: answers in another language than the question, or in two languages."""

# ruff: noqa: RUF001  # texts in many scripts

from typing import Any

import pytest

from rewards import Rollout, Score, get
from rewards.registry import BoundReward
from rl.types import Prompt
from tests.support.patience import at_most

MEGABYTE = 1 << 20
QUESTION = "How long is the longest side of this triangle, and how do you know?"
SAME = {
    "en": "The longest side is the hypotenuse, which is thirteen units long because the squares of the other two "
    "sides add up to one hundred and sixty-nine.",
    "zh": "最长的边是斜边，长度为13，因为另外两条边的平方和等于169。所以这个三角形是直角三角形。",
    "ja": "最も長い辺は斜辺で、長さは13です。他の二辺の二乗の和が169になるからです。",
    "ko": "가장 긴 변은 빗변이고 길이는 13입니다. 나머지 두 변의 제곱의 합이 169이기 때문입니다.",
    "fr": "Le plus long côté est l'hypoténuse, dont la longueur vaut treize, car la somme des carrés des deux autres "
    "côtés vaut cent soixante-neuf.",
    "de": "Die längste Seite ist die Hypotenuse mit der Länge dreizehn, weil die Summe der Quadrate der beiden anderen "
    "Seiten hundertneunundsechzig beträgt.",
    "es": "El lado más largo es la hipotenusa, que mide trece unidades, porque la suma de los cuadrados de los otros "
    "dos lados es ciento sesenta y nueve.",
    "pt": "O lado mais comprido é a hipotenusa, que mede treze unidades, porque a soma dos quadrados dos outros dois "
    "lados é cento e sessenta e nove.",
    "it": "Il lato più lungo è l'ipotenusa, che misura tredici unità, perché la somma dei quadrati degli altri due "
    "lati è centosessantanove.",
    "nl": "De langste zijde is de schuine zijde met lengte dertien, omdat de som van de kwadraten van de andere twee "
    "zijden honderdnegenenzestig is.",
    "pl": "Najdłuższy bok to przeciwprostokątna o długości trzynaście, ponieważ suma kwadratów dwóch pozostałych boków "
    "wynosi sto sześćdziesiąt dziewięć.",
    "ru": "Самая длинная сторона — гипотенуза, её длина равна тринадцати, потому что сумма квадратов двух других "
    "сторон равна ста шестидесяти девяти.",
    "uk": "Найдовша сторона — це гіпотенуза, її довжина дорівнює тринадцяти, бо сума квадратів двох інших сторін "
    "дорівнює ста шістдесяти дев'яти.",
    "ar": "أطول ضلع هو الوتر وطوله ثلاثة عشر، لأن مجموع مربعي الضلعين الآخرين يساوي مئة وتسعة وستين.",
    "fa": "بلندترین ضلع وتر است و طول آن سیزده است، زیرا مجموع مربع‌های دو ضلع دیگر برابر با صد و شصت و نه است.",
    "hi": "सबसे लंबी भुजा कर्ण है और उसकी लंबाई तेरह है, क्योंकि बाकी दो भुजाओं के वर्गों का योग एक सौ उनहत्तर है।",
    "th": "ด้านที่ยาวที่สุดคือด้านตรงข้ามมุมฉาก ยาวสิบสามหน่วย เพราะผลรวมของกำลังสองของอีกสองด้านเท่ากับหนึ่งร้อยหกสิบเก้า",
    "vi": "Cạnh dài nhất là cạnh huyền, có độ dài mười ba, vì tổng bình phương của hai cạnh còn lại bằng một trăm sáu "
    "mươi chín.",
    "tr": "En uzun kenar hipotenüstür ve uzunluğu on üçtür, çünkü diğer iki kenarın karelerinin toplamı yüz altmış "
    "dokuzdur.",
}  # the same text in nineteen languages
CHINESE, GERMAN, ENGLISH = SAME["zh"], SAME["de"], SAME["en"]

# Solutions in the style of models. None of these solutions mixes languages.
SOLUTIONS = [
    r"We have $x^2 - 5x + 6 = (x-2)(x-3)$, so the roots are $2$ and $3$. \boxed{5}",
    r"The slope is $\frac{7-1}{4-2} = 3$. Thus the line is $y = 3x - 5$.",
    r"\boxed{42}",
    "Answer: 17",
    "x = 3, y = -2",
    "Thus, the answer is (B).",
    r"By AM-GM, \[\frac{a+b}{2} \ge \sqrt{ab},\] with equality iff $a = b$. Hence the minimum is $\boxed{4}$.",
    r"Let $\angle ABC = \theta$. Then $\cos\theta = \frac{3}{5}$, so $\sin\theta = \frac{4}{5}$ and the area is $24$.",
    "Simplify: 2x + 3x = 5x. Divide both sides by 5. Therefore x = 4.",
    r"Using Vieta's formulas, $r + s = -\frac{b}{a}$ and $rs = \frac{c}{a}$. So we get $\boxed{\frac{14}{3}}$.",
    "Step 1: Draw the altitude from A to BC.\nStep 2: Apply the Pythagorean theorem.\nStep 3: The length is 12.",
    r"The determinant is \begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix} = -2, so the matrix is invertible.",
    "There are C(5,2) = 10 ways to choose, and 3! = 6 ways to order, for a total of 60.",
    r"$\tan 45^\circ = 1$. Ergo the height equals the base, q.e.d.",
    "The bar for 2019 is about 40, the bar for 2020 about 55; the difference is 15.",
    "Médiane and Gauss sums aside, the mean is (2 + 4 + 9) / 3 = 5.",
    "Let n be the number of students. Then 3n + 7 = 40, so n = 11. There are 11 students.",
    r"Note that $7^4 \equiv 1 \pmod{10}$; since $222 \equiv 2 \pmod 4$, the units digit is $9$.",
    r"First, $\int_0^1 x\,dx = \frac12$. Next, $\int_1^2 (2-x)\,dx = \frac12$. In total, $1$.",
    "Triangle ABC ~ triangle DEF by AA similarity. So AB/DE = BC/EF, i.e. 6/3 = 8/x. Then x = 4.",
    "f(g(2)) = f(5) = 11.",
    "sin x = 1/2 gives x = 30 or x = 150 degrees. Only x = 30 is acute.",
    "The probability is 1 - 5/6 * 5/6 = 11/36.",
    "# Solution\n\n**Given:** a cube of edge 3 cm.\n\n**Volume:** 27 cm^3.\n\n**Surface:** 54 cm^2.",
    "| side | length |\n|---|---|\n| AB | 3 |\n| BC | 4 |\n\nThe perimeter is 12.",
    "Without loss of generality, assume a < b < c. Then a + b > c, contradiction.",
    "Speed = distance / time = 120 km / 1.5 h = 80 km/h.",
    r"The vertex of $y = x^2 - 4x + 7$ is at $(2, 3)$; the minimum value is $3$.",
    "Odd numbers: 1, 3, 5, 7, 9. Even numbers: 2, 4, 6, 8. So there is one more odd number.",
    r"Consider $z = re^{i\theta}$. Its conjugate is $\bar z = re^{-i\theta}$, hence $z\bar z = r^2$.",
    "Set up the proportion 3 : 5 = x : 20. Cross multiply to get 5x = 60, and so x = 12.",
    "Geometric series, ratio 1/3, first term 6. Sum = 6 / (1 - 1/3) = 9.",
    "The chart shows four categories. Category C is the largest with 37 percent.",
    r"Since $\log_2 8 = 3$ and $\log_2 32 = 5$, the product is $15$.",
    "Maria has 12 apples, Juan has 7. Together: 19. After eating 4: 15.",
    "π ≈ 3.14159, so the circumference 2πr with r = 5 is about 31.4.",
    "Base case n = 1: trivial. Inductive step: assume for n, prove for n + 1. Done.",
    "Case 1: x > 0. Case 2: x < 0. Case 3: x = 0. Only case 1 works.",
    "We compute a_1 = 1, a_2 = 1, a_3 = 2, a_4 = 3, a_5 = 5, a_6 = 8. The Fibonacci sequence.",
    "I counted the red circles: 7. I counted the blue squares: 4. Difference: 3.",
]


@pytest.fixture(scope="module")
def penalty() -> BoundReward:
    return get("language_consistency")


def judged(bound: BoundReward, answer: str, question: str = QUESTION, system: str = "") -> Score:
    messages: tuple[dict[str, Any], ...] = (
        {"role": "system", "content": system},
        {"role": "user", "content": "Wie groß ist der Winkel links oben in diesem Bild?"},
        {"role": "assistant", "content": "Er ist etwa neunzig Grad groß."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
    )
    return bound(Rollout(Prompt("row-1", "chat", messages), answer))


@pytest.mark.parametrize("language", SAME)
def test_an_answer_offends_if_and_only_if_it_is_in_another_language(penalty: BoundReward, language: str) -> None:
    for other, text in SAME.items():
        score = judged(penalty, text, SAME[language])
        assert score.value == float(other != language), (other, score)


@pytest.mark.parametrize("language", SAME)
def test_a_second_language_after_the_first_offends(penalty: BoundReward, language: str) -> None:
    for other, text in SAME.items():
        score = judged(penalty, f"{SAME[language]} {text}", SAME[language])
        assert score.value == float(other != language), (other, score)


def test_the_details_name_the_languages_and_their_shares(penalty: BoundReward) -> None:
    details = judged(penalty, f"{ENGLISH} {CHINESE}").details
    assert details["allowed"] == ["en"]
    assert set(details["answer"]["languages"]) == {"en", "zh"}
    assert details["answer"]["why"] == "mixed: zh in en"


@pytest.mark.parametrize("solution", SOLUTIONS)
def test_ordinary_solutions_are_consistent(penalty: BoundReward, solution: str) -> None:
    score = judged(penalty, solution)
    assert score.value == 0.0, score


def test_all_ordinary_solutions_in_one_text_are_consistent(penalty: BoundReward) -> None:
    score = judged(penalty, "\n\n".join(SOLUTIONS))
    assert (score.value, list(score.details["answer"]["languages"])) == (0.0, ["en"])


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Translate into French: the cat sleeps on the sofa.", SAME["fr"]),
        ("Say it in Spanish.", SAME["es"]),
        ("请用英文回答：最长的边是哪条？", ENGLISH),
        ("英語で答えてください。最も長い辺はどれですか。", ENGLISH),
        ("Ответь на английском: какая сторона самая длинная?", ENGLISH),
        ("Bitte auf Englisch: Welche Seite ist die längste?", ENGLISH),
        ("Answer in both English and 中文: which side is the longest?", f"{ENGLISH}\n\n{CHINESE}"),
        (f"Summarise this text: {CHINESE}", CHINESE),
        (f"Summarise this text: {CHINESE}", ENGLISH),
        (f"Explain: {CHINESE}", ENGLISH),
        (f"{ENGLISH}\n翻译", CHINESE),
    ],
)
def test_a_language_that_the_question_names_or_is_written_in_is_allowed(
    penalty: BoundReward, question: str, answer: str
) -> None:
    assert judged(penalty, answer, question).value == 0.0


def test_a_language_that_the_system_message_names_is_allowed(penalty: BoundReward) -> None:
    assert judged(penalty, GERMAN, system="Always reply in German.").value == 0.0
    assert judged(penalty, SAME["fr"], system="Always reply in German.").value == 1.0


def test_a_country_is_not_a_language(penalty: BoundReward) -> None:
    assert judged(penalty, GERMAN, "Which rivers flow through Germany, and how long are they?").value == 1.0


@pytest.mark.parametrize(
    ("question", "answer", "offence"),
    [
        ("Solve $x^2=4$.", "解得 x 等于正负二，所以答案是二。", 1.0),
        ("求解 $x^2=4$", "The solutions are two and minus two.", 1.0),
        ("请用 Python 写一个函数来计算面积。", "The solutions are two and minus two.", 1.0),
        ("求解 $x^2=4$", "解得 x 等于正负二。", 0.0),
        ("Solve $x^2=4$.", "The answer is four.", 0.0),
        ("$x^2=4$?", CHINESE, 0.0),
        ("", GERMAN, 0.0),
        (QUESTION, "13", 0.0),
        (QUESTION, "Dreizehn.", 0.0),
        (QUESTION, "", 0.0),
        (QUESTION, "十三", 0.0),
        (QUESTION, "长度为十三个单位", 1.0),
    ],
)
def test_a_text_too_short_to_identify_passes_unless_its_script_is_wrong(
    penalty: BoundReward, question: str, answer: str, offence: float
) -> None:
    assert judged(penalty, answer, question).value == offence


@pytest.mark.parametrize(
    "foreign",
    [
        f"```python\n# {CHINESE}\n```",
        f"    ```\n    {CHINESE}\n    ```",
        f"~~~~\n~~~\n{GERMAN}\n~~~~",
        f"`{CHINESE}`",
        f"${CHINESE}$",
        f"\\[ \\text{{{CHINESE}}} \\]",
        f"\\({CHINESE}\\)",
        f"\\begin{{align*}}\\begin{{matrix}}{CHINESE}\\end{{matrix}}{CHINESE}\\end{{align*}}",
        f'"{GERMAN}"',
        f"“{CHINESE}”",
        f"„{GERMAN}“",
        f"«{SAME['fr']}»",
        f"「{SAME['ja']}」",
        f"\n> {GERMAN}\n",
        "https://example.org/最长的边是斜边最长的边是斜边",
        "the word 斜边",
    ],
)
def test_code_formulas_quotations_links_and_single_words_are_ignored(penalty: BoundReward, foreign: str) -> None:
    score = judged(penalty, f"{ENGLISH} It was written:\n{foreign}\n\nThat is all there is to say about this triangle.")
    assert score.value == 0.0, score


@pytest.mark.parametrize(
    "opening", ["```\n", "~~~python\n", "$", "$$", "\\[", "\\(", "\\begin{align}", '"', "“", "«", "`", "<a"]
)
def test_delimiters_that_never_close_hide_no_text(penalty: BoundReward, opening: str) -> None:
    assert judged(penalty, f"{ENGLISH}\n{opening}{CHINESE}").value == 1.0
    assert judged(penalty, f"{ENGLISH}\n{opening}{GERMAN}").value == 1.0


def test_the_details_say_that_an_answer_is_only_code_or_quotations(penalty: BoundReward) -> None:
    score = judged(penalty, f"```\n{CHINESE * 8}\n```")
    assert score.value == 0.0
    assert "nearly all of the text is code" in score.details["answer"]["why"]


@pytest.mark.parametrize(
    "answer",
    [
        "我们用 Python 和 TensorFlow 来计算 GPU 的速度，使用 softmax 函数和 attention 机制。",
        "这幅画是 Vincent van Gogh 在 New York 的 MoMA 展出的作品，画的是星空。",
        "他在宝可梦里最喜欢的是ピカチュウ，因为它又小又可爱。",
    ],
)
def test_latin_names_and_terms_in_chinese_are_ignored(penalty: BoundReward, answer: str) -> None:
    assert judged(penalty, answer, "这个东西是什么？").value == 0.0


def test_foreign_words_from_the_question_are_ignored(penalty: BoundReward) -> None:
    answer = "The saying 学而时习之 is by Confucius: 学 is to learn, 习 is to practise."
    assert judged(penalty, answer, "What does 学而时习之 mean?").value == 0.0


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (QUESTION, "Therefore the area 等于 twelve 平方 centimetres."),
        (QUESTION, "So the side is 13, потому что сумма квадратов равна 169."),
        ("这个三角形的面积是多少？", "所以 the answer 是 four 因为 it is even"),
        ("这个三角形的面积是多少？", f"面积是十二。{ENGLISH}"),
        ("最も長い辺はどれですか。", f"{SAME['ja']}{CHINESE}"),
    ],
)
def test_switching_the_language_within_a_text_offends(penalty: BoundReward, question: str, answer: str) -> None:
    score = judged(penalty, answer, question)
    assert score.value == 1.0, score


def test_a_share_up_to_the_tolerance_does_not_offend() -> None:
    answer = f"{ENGLISH * 6} {CHINESE}"  # the share of Chinese is about 12 %
    assert judged(get("language_consistency", {"tolerance": 0.3}), answer).value == 0.0
    assert judged(get("language_consistency", {"tolerance": 0.05}), answer).value == 1.0


def test_reasoning_is_judged_only_with_the_parameter_reasoning(penalty: BoundReward) -> None:
    text = f"<think>{CHINESE}</think>{ENGLISH}"
    assert judged(penalty, text).value == 0.0
    score = judged(get("language_consistency", {"reasoning": True}), text)
    assert score.value == 1.0
    assert score.details["reasoning"]["why"] == "another language: zh"


def test_with_one_language_per_script_the_script_decides() -> None:
    bound = get("language_consistency", {"languages": ["en", "zh"]})
    assert judged(bound, SAME["ru"]).value == judged(bound, CHINESE).value == 1.0
    assert judged(bound, ENGLISH).value == judged(bound, SAME["ru"], SAME["uk"]).value == 0.0


def test_similar_languages_count_as_one(penalty: BoundReward) -> None:
    bound = get("language_consistency", {"languages": ["en", "da", "nb", "sv"]})
    danish = "Den længste side er hypotenusen, fordi summen af kvadraterne på de to andre sider er hundrede."
    norwegian = "Den lengste siden er hypotenusen, fordi summen av kvadratene på de to andre sidene er hundre."
    assert judged(bound, norwegian, danish).value == 0.0


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"languages": ["en"]}, "at least two"),
        ({"languages": ["en", "xx"]}, r"no language is called \['xx'\]"),
        ({"tolerance": 1.0}, "tolerance is 1.0"),
    ],
)
def test_invalid_parameters_are_refused(params: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        judged(get("language_consistency", params), "")


HOSTILE = {
    "null bytes": "\0" * MEGABYTE,
    "right to left": "\u202e\u200f" * (MEGABYTE // 2),
    "surrogates": "\ud800" * MEGABYTE,
    "dollars": "$" * MEGABYTE,
    "dollars and letters": "$a " * (MEGABYTE // 3),
    "fences": "```\n" * (MEGABYTE // 4),
    "open brackets": "\\[a" * (MEGABYTE // 3),
    "environments": "\\begin{align}" * (MEGABYTE // 13),
    "quotes": '"a' * (MEGABYTE // 2),
    "backticks": "`" * MEGABYTE,
    "tags": "<a" * (MEGABYTE // 2),
    "backslashes": "\\" * MEGABYTE,
    "one word": "a" * MEGABYTE,
    "digits": "1" * MEGABYTE,
    "apostrophes": "a'" * (MEGABYTE // 2),
    "accents": "a" + "\u0301" * MEGABYTE,
    "dots": "." * MEGABYTE,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_text_is_scored_in_bounded_time(penalty: BoundReward, kind: str) -> None:
    with at_most(5):
        assert judged(penalty, HOSTILE[kind]).value == 0.0


@pytest.mark.parametrize(
    "text", ["字" * MEGABYTE, "a字" * MEGABYTE, "\ufdfa" * MEGABYTE, "la réponse est là. " * 50_000]
)
def test_megabytes_of_another_language_offend_in_bounded_time(penalty: BoundReward, text: str) -> None:
    with at_most(8):
        assert judged(penalty, text).value == 1.0


def test_invisible_characters_do_not_hide_a_language(penalty: BoundReward) -> None:
    hidden = "\u200b".join(GERMAN)
    assert judged(penalty, hidden).value == 1.0
    assert judged(penalty, "\ud800".join(GERMAN) + "\0").value == 1.0
