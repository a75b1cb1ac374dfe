"""Tests that templates from model folders and recipes cannot run code."""

from pathlib import Path

import pytest
from jinja2 import UndefinedError
from jinja2.sandbox import SecurityError

from rl.templates import template_environment

ESCAPES = (
    "{{ problem.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''.__class__ }}",
    "{{ problem.format.__globals__ }}",
    "{{ '{0.__class__}'.format(problem) }}",
    "{{ messages.append('x') }}",
    "{% for i in range(10 ** 12) %}{% endfor %}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ (lipsum | attr('__globals__'))['os'] }}",
)


@pytest.mark.parametrize("text", ESCAPES)
def test_a_template_that_reaches_for_python_fails(text: str) -> None:
    template = template_environment().from_string(text)
    with pytest.raises((SecurityError, UndefinedError, OverflowError)):
        template.render(problem="2 + 3", messages=["5"])


def test_a_template_can_read_its_variables_and_include_a_neighbour(tmp_path: Path) -> None:
    (tmp_path / "neighbour.jinja").write_text("[{{ messages | length }}]")
    text = "{{ problem.upper() }} {% for m in messages %}{{ loop.index }}:{{ m }} {% endfor %}"
    template = template_environment(tmp_path).from_string(text + "{% include 'neighbour.jinja' %}")
    assert template.render(problem="sum", messages=["5", "6"]) == "SUM 1:5 2:6 [2]"


def test_a_template_cannot_include_a_file_of_another_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    (tmp_path / "templates").mkdir()
    with pytest.raises(Exception, match="secret"):
        template_environment(tmp_path / "templates").from_string("{% include '../secret' %}").render()
