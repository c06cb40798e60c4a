"""``report``: figures from real sets, a page that nothing in it can harm, a mail of both."""

import base64
import email
import hashlib
import json
import re
from datetime import timedelta
from email.policy import default
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.component.test_status import NOW, Host
from tests.component.test_status import host as host  # noqa: PLC0414 - a fixture

pytestmark = pytest.mark.component
EVIL = "<img src=x onerror=alert(1)>"
SENDMAIL = '#!/bin/sh\ncat >{0}/mail\necho "$@" >{0}/mail.args\n'


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def fleet(host: Host) -> Host:
    """Two domains with points, one without; one of them has a name of ill will."""
    host.libvirt("vm1", EVIL.replace("<", "&lt;").replace(">", "&gt;"), "fresh")
    host.main("retention: {last: 1}\nnotification: {mail: [ops@example.org]}\n")
    host.file("a", "match: {glob: '*'}")
    for days in (40, 3, 2, 0):
        host.save("vm1", NOW - timedelta(days=days, hours=1), set_name="2026-01")
    host.save(EVIL, NOW - timedelta(days=5))
    return host


def test_figures_are_those_of_the_points_that_are_there(fleet: Host) -> None:
    code, out = fleet.run("report", "--json", "--since", "7d")
    found, status = json.loads(out), json.loads(fleet.run("status", "--json")[1])
    assert code == 3
    assert (found["health"], found["moment"]) == (status["health"], status["moment"])
    days = found["days"]
    assert [day["day"] for day in days] == [f"2026-02-{each:02}" for each in range(3, 11)]
    assert [day["points"] for day in days] == [0, 0, 1, 0, 1, 1, 0, 1]
    stored = sum(each["all_bytes"] for each in status["domains"])
    assert days[-1]["total_bytes"] == stored
    assert stored - sum(day["new_bytes"] for day in days) == days[0]["total_bytes"]
    domains = {each["domain"]: each for each in found["domains"]}
    assert domains.keys() == {"vm1", EVIL, "fresh"}
    assert {name: each["new_points"] for name, each in domains.items()} == {
        "vm1": 3, EVIL: 1, "fresh": 0,
    }  # fmt: skip
    for each in status["domains"]:
        assert domains[each["domain"]].items() >= each.items()
    assert domains["vm1"]["unwanted_points"] == 3
    only = json.loads(fleet.run("report", "--json", "vm1")[1])
    assert [each["domain"] for each in only["domains"]] == ["vm1"]
    assert len(only["days"]) == 31


def test_for_a_terminal(fleet: Host) -> None:
    code, out = fleet.run("report")
    assert code == 3
    assert re.search(r"2026-01-11 to 2026-02-10: domains 3, not well \d, new points 4", out)
    assert "fresh: no restore point yet" in out
    assert max(map(len, out.splitlines())) < 160


def test_the_page_is_alone_and_harmless(fleet: Host, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    assert fleet.run("report", "--html", str(path))[0] == 3
    assert path.stat().st_mode & 0o777 == 0o600
    text = path.read_text()
    page = Page(text)
    assert EVIL in page.text
    names = {tag for tag, _ in page.tags}
    assert not names & {"img", "script", "link", "iframe", "object", "form", "a"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        assert not attributes.keys() & {"src", "href", "xlink:href"}, tag
    (policy,) = [
        attributes["content"] or "" for tag, attributes in page.tags
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]  # fmt: skip
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'; ")
    assert len([tag for tag, attributes in page.tags if attributes.get("class") == "bar"]) == 4
    # a place where nothing can be written: one line, and no half page
    code, _ = fleet.run("report", "--html", str(tmp_path / "none/report.html"))
    assert code not in (0, 1, 3)


def test_an_empty_host(host: Host, tmp_path: Path) -> None:
    host.libvirt()
    path = tmp_path / "report.html"
    code, out = host.run("report", "--html", str(path), "--since", "0d")
    assert code == 0
    assert "no domains" in out
    assert "No domain is known" in Page(path.read_text()).text


def test_by_mail(fleet: Host, tmp_path: Path) -> None:
    program = tmp_path / "bin/sendmail"
    program.write_text(SENDMAIL.format(tmp_path))
    program.chmod(0o755)
    code, out = fleet.run("report", "--mail")
    assert code == 0
    assert out.startswith("sent: Backups of ")
    assert (tmp_path / "mail.args").read_text().split() == ["-i", "--", "ops@example.org"]
    mail = email.message_from_bytes((tmp_path / "mail").read_bytes(), policy=default)
    assert re.fullmatch(r"Backups of \S+: \d of 3 domains need attention", mail["Subject"])
    text, page = mail.iter_parts()
    assert "fresh: no restore point yet" in text.get_content()
    assert "Content-Security-Policy" in page.get_content()
    fleet.main()
    assert fleet.run("report", "--mail")[0] == 10
