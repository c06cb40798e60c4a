"""The sources of Cockpit's page: what no browser is needed for."""

import re

from scripts import gen_pot
from scripts.generated import stale

HTML = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|srcdoc|\beval\b|Function\("
)


def test_the_catalogue_is_current() -> None:
    assert stale(gen_pot.generated()) == [], "run scripts/gen-pot"


def test_every_text_is_found() -> None:
    source = 'a(_("one"), _(\n  "two " +\n  "\\"halves\\""));'
    assert gen_pot.texts(source) == ["one", 'two "halves"']
    assert gen_pot.quoted('two "halves"') == '"two \\"halves\\""'
    for path in gen_pot.PAGE.glob("*.js"):
        text = path.read_text()
        assert len(re.findall(r"\b_\(", text)) == len(gen_pot.texts(text)), path


def test_nothing_reads_html_or_comes_from_elsewhere() -> None:
    sources = [path for path in gen_pot.PAGE.iterdir() if path.suffix in (".js", ".html", ".css")]
    assert len(sources) > 5
    for path in sources:
        text = path.read_text()
        assert not HTML.search(text), path
        assert set(re.findall(r"https?://[^\"]+", text)) <= {"http://www.w3.org/2000/svg"}, path
    # one module starts commands, all of them ours
    starting = [path.name for path in sources if "cockpit.spawn" in path.read_text()]
    assert starting == ["command.js"]
