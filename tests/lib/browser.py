"""Cockpit as the session of this account, and a headless Chromium that is led by its driver."""

import base64
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from tests.lib.ready import ROOT

SECONDS = 60.0
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
CHROMIUM = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--force-device-scale-factor=1", "--lang=en-US",
)  # fmt: skip


def wait_for(look: Callable[[], Any], what: str) -> Any:
    """What ``look`` returns as soon as that is true; AssertionError after a generous while."""
    deadline = time.monotonic() + SECONDS
    while not (found := look()):
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(0.1)
    return found


@contextmanager
def program(argv: list[str], environment: dict[str, str], directory: Path) -> Iterator[int]:
    """Run a server that says its port, or is told it, in a group of its own."""
    with (directory / f"{Path(argv[0]).name}.log").open("wb") as log:
        process = subprocess.Popen(
            argv, env=environment, cwd=directory, stdin=subprocess.DEVNULL, stdout=log,
            stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        yield wait_for(lambda: port_of(process), f"the port of {argv[0]}")
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(SECONDS)


def port_of(process: "subprocess.Popen[bytes]") -> int:
    """The TCP port that a process listens on, by the kernel's tables; 0 if there is none yet."""
    assert process.poll() is None, process.args
    sockets = set()
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        try:
            sockets.add(str(entry.readlink()))
        except FileNotFoundError:
            continue
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
            return int(words[1].partition(":")[2], 16)
    return 0


@contextmanager
def cockpit(ctl: list[str], environment: dict[str, str], directory: Path) -> Iterator[str]:
    """Serve our page; ``ctl`` is how nbdbackupctl begins. The address of the page.

    The words of each command are a line of ``directory / "commands"``.
    """
    home = directory / "home"
    (home / "cockpit").mkdir(parents=True)
    (home / "cockpit/nbdbackup").symlink_to(ROOT / "cockpit")
    programs = directory / "programs"
    programs.mkdir()
    wrapper = programs / "nbdbackupctl"
    exports = "".join(f"export {name}='{value}'\n" for name, value in environment.items())
    wrapper.write_text(
        f"#!/bin/sh\n{exports}echo \"$*\" >>'{directory}/commands'\ncd '{ROOT}'\n"
        f'exec {" ".join(ctl)} "$@"\n'
    )
    wrapper.chmod(0o755)
    outer = {
        "PATH": f"{programs}:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(home), "USER": "root",
        "XDG_DATA_HOME": str(home), "XDG_RUNTIME_DIR": str(home), "LC_ALL": "C.UTF-8",
        "XDG_CONFIG_DIRS": str(home),
    }  # fmt: skip
    argv = ["/usr/lib/cockpit/cockpit-ws", "--no-tls", "-a", "127.0.0.1", "-p", "0",
            "--local-session=/usr/bin/cockpit-bridge"]  # fmt: skip
    with program(argv, outer, directory) as port:
        yield f"http://127.0.0.1:{port}/cockpit/@localhost/nbdbackup/index.html"


class Browser:
    """A window, by the WebDriver protocol."""

    def __init__(self, port: int, directory: Path) -> None:
        self._port, self._base = port, ""
        options = {"args": [*CHROMIUM, f"--user-data-dir={directory}/profile"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self._call("POST", "/session", capabilities={"alwaysMatch": wanted})
        self._base += f"/session/{made['sessionId']}"

    def _call(self, method: str, path: str, **body: Any) -> Any:
        data = json.dumps(body) if method == "POST" else None
        connection = HTTPConnection("127.0.0.1", self._port, timeout=SECONDS)
        try:
            connection.request(method, self._base + path, data)
            answer = connection.getresponse()
            value = json.load(answer)["value"]
        finally:
            connection.close()
        assert answer.status == HTTPStatus.OK, value["message"]
        return value

    def close(self) -> None:
        """End it."""
        self._call("DELETE", "")

    def size(self, width: int, height: int) -> None:
        """Make the window so large."""
        self._call("POST", "/window/rect", width=width, height=height)

    def open(self, address: str) -> None:
        """Load a page."""
        self._call("POST", "/url", url=address)

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of the body of a function in the page."""
        return self._call("POST", "/execute/sync", script=script, args=list(arguments))

    def text(self) -> str:
        """What the page shows."""
        return str(self.run("return document.body.innerText"))

    def await_text(self, text: str) -> str:
        """Wait until the page shows a text; all that it shows."""
        try:
            wait_for(lambda: text in self.text(), text)
        except AssertionError as err:
            raise AssertionError(f"no {text!r}: {self.text()}\n{self.errors()}") from err
        return self.text()

    def click(self, selector: str) -> None:
        """As with a mouse, on the first such element."""
        found = self._call("POST", "/element", using="css selector", value=selector)
        self._call("POST", f"/element/{found[ELEMENT]}/click")

    def type(self, keys: str) -> None:
        """Press keys, wherever the focus is."""
        pressed = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        source = {"type": "key", "id": "keyboard", "actions": pressed}
        self._call("POST", "/actions", actions=[source])

    def errors(self) -> list[str]:
        """What the console has got since the last call."""
        return [each["message"] for each in self._call("POST", "/se/log", type="browser")]

    def picture(self, path: Path) -> None:
        """The whole page as a PNG."""
        height = self.run("return document.documentElement.scrollHeight")
        self.size(1280, max(600, min(height + 150, 3000)))
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))


@contextmanager
def browser(directory: Path) -> Iterator[Browser]:
    """A Chromium with a profile of its own."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(directory), "LC_ALL": "C.UTF-8"}
    with program(["/usr/bin/chromedriver", "--port=0"], environment, directory) as port:
        found = Browser(port, directory)
        try:
            yield found
        finally:
            found.close()
