"""The page of Cockpit: the real Cockpit, Chromium, and guests."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nbdbackupd.repo import layout
from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import Guest
from tests.lib import browser
from tests.lib.browser import Browser
from tests.lib.ctl import Ctl
from tests.lib.ready import ROOT
from tests.lib.sets import Change, SetBuilder

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]
HOSTILE = "<img src=x onerror=alert(1)>"
TAB, ENTER = "\ue004", "\ue007"
PICTURES = "NBDBACKUP_ARTEFACTS"


@dataclass
class Page:
    """The page in a window, and the host behind it."""

    window: Browser
    address: str
    directory: Path
    ctl: Ctl
    guest: Guest

    @property
    def commands(self) -> list[str]:
        return (self.directory / "commands").read_text().splitlines()

    def picture(self, name: str) -> None:
        folder = Path(os.environ.get(PICTURES, self.directory))
        folder.mkdir(parents=True, exist_ok=True)
        self.window.picture(folder / f"cockpit-{name}.png")


@pytest.fixture(scope="module")
def page(lab: DaemonLab) -> Iterator[Page]:
    # where QEMU's account gets through
    directory = lab.directory / "page"
    directory.mkdir()
    guest = lab.guest("web", [DiskSpec(size=16 * MIB)])
    guest.start()
    ctl = Ctl(lab.uri, directory)
    repository = directory / "repository"
    folder = repository / layout.escape(HOSTILE, layout.MAX_DOMAIN)
    folder.mkdir(parents=True)
    hostile = SetBuilder(folder / "2026-01", level=1, domain=HOSTILE)
    hostile.disks["vda"] = bytearray(os.urandom(MIB))
    hostile.full()
    for number in range(5):
        hostile.inc({"vda": [Change(number << 16, os.urandom(1 << (12 + number)))]})
    ctl("verify", hostile.path, "--point", hostile.points[2].id)
    (directory / "config/domains.d").mkdir(parents=True)
    (directory / "config/nbdbackup.yaml").write_text(
        f"repository: {{path: {repository}}}\nretention: {{last: 3}}\n"
        f"scratch: {{reserve: 16M, directory: {ctl.scratch}}}\n"
    )
    (directory / "config/domains.d/web.yaml").write_text("match: {name: web}\n")
    head = [*ctl.argv("status")[:-1], "--config-dir", f"{directory}/config"]
    with (
        browser.cockpit(head, ctl.environment, directory) as address,
        browser.browser(directory) as window,
    ):
        window.size(1280, 900)
        yield Page(window, address, directory, ctl, guest)


def test_domains_are_seen_and_saved(page: Page) -> None:
    window = page.window
    window.open(page.address)
    shown = window.await_text(HOSTILE)
    assert "no restore point yet" in shown
    assert window.run("return document.querySelector('img')") is None
    assert page.commands == ["--json status"]
    page.picture("domains")

    # a point of a domain with a hostile name, by the keyboard alone
    window.run("document.querySelector('input').focus()")
    window.type("IMG")
    window.await_text(HOSTILE)
    assert "web" not in window.run("return document.querySelector('tbody').innerText")
    window.type(TAB + ENTER)
    shown = window.await_text("Time line")
    assert len(window.run("return [...document.querySelectorAll('svg.chart g.point')]")) == 6
    assert shown.count("increment") >= 5
    assert "merged into" in shown
    assert "3 of 6 points" in shown
    assert window.run("return document.querySelector('h1').textContent") == HOSTILE
    window.await_text("Log")
    page.picture("domain")
    window.run("localStorage.setItem('shell:style', 'dark')")
    window.run("window.dispatchEvent(new Event('cockpit-style'))")
    page.picture("dark")
    window.run("localStorage.setItem('shell:style', 'light')")
    window.run("window.dispatchEvent(new Event('cockpit-style'))")
    # what can't be saved: the command's own words
    window.click("button.pf-m-primary")
    window.await_text("Nothing was saved")
    page.picture("failure")

    window.click("nav a")
    window.await_text("web")
    window.run("document.querySelector('[data-key=web]').click()")
    window.await_text("No restore point yet")
    page.picture("empty")
    for saved in ("Saved: full", "Saved: increment"):
        page.guest.write("vda", MIB, 2 * MIB, 7)
        window.click("button.pf-m-primary")
        window.await_text("The backup runs")
        window.await_text(saved)
    wanted = page.guest.reference("vda", page.directory / "reference.raw")
    (folder,) = (page.directory / "repository/web").iterdir()
    window.await_text(page.ctl.points(folder)[-1]["id"])
    page.picture("saved")
    (image,) = page.ctl.restore(folder, page.directory / "out", "--format", "raw").values()
    assert image.read_bytes() == wanted.read_bytes()
    assert window.errors() == []


def test_scripts_of_others_do_not_run(page: Page) -> None:
    """No script but those of files runs."""
    window = page.window
    window.open(page.address)
    window.await_text("web")
    window.run(
        "const s = document.createElement('script'); s.textContent = 'window.bad = 1';"
        "document.body.append(s)"
    )
    assert window.run("return window.bad") is None
    assert any("Content Security Policy" in each for each in window.errors())
    manifest = json.loads((ROOT / "cockpit/manifest.json").read_text())
    assert "unsafe" not in manifest["content-security-policy"]
