"""``map`` and ``unmap`` from the command line: in front, detached, killed; who may connect."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest

from nbdbackupd.ops.map import mapped
from nbdbackupd.repo import reading
from tests.lib import sets
from tests.lib.ctl import Ctl
from tests.lib.sets import SetBuilder

pytestmark = pytest.mark.component

KIB = 1 << 10
MIB = 1 << 20
SECONDS = 30.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SetBuilder:
    """A set of two disks and two points; no test changes it."""
    rng = random.Random(3)
    builder = SetBuilder(tmp_path_factory.mktemp("made") / "a set", level=2)
    builder.disks = {"vda": sets.random_disk(rng, 2 * MIB), "vdb": sets.random_disk(rng, MIB)}
    builder.full()
    builder.inc({"vda": sets.random_changes(rng, 2 * MIB, 9)})
    return builder


@pytest.fixture
def ctl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ctl]:
    """The command; in the end nothing is mapped, no server runs, no socket is left."""
    program = Ctl("test:///default", tmp_path_factory.mktemp("c"))
    yield program
    left = servers(program)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert left == []
    assert list((program.runtime / "map").glob("*/*")) == []


def servers(ctl: Ctl) -> list[int]:
    """All nbdkits of a runtime directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if words[0] == b"nbdkit" and os.fsencode(ctl.runtime) in b" ".join(words):
                found.append(int(path.parent.name))
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextlib.contextmanager
def in_front(ctl: Ctl, *words: str | os.PathLike[str]) -> Iterator[tuple[Any, Any]]:
    """``map`` in the foreground: process and report; the caller ends it."""
    with ctl.start("map", "--json", *words) as process:
        text = ""
        assert process.stdout is not None
        while line := process.stdout.readline():
            text += line
            if line == "}\n":
                break
        assert text, process.communicate()
        yield process, json.loads(text)


def read(uri: str) -> bytes:
    argv = ["nbdcopy", uri, "-"]
    return subprocess.run(argv, check=True, capture_output=True, timeout=60).stdout


def contents(path: Path) -> dict[str, bytes]:
    return {str(each): each.read_bytes() for each in path.rglob("*") if each.is_file()}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_nothing_is_left(
    signum: signal.Signals, ctl: Ctl, made: SetBuilder
) -> None:
    with in_front(ctl, made.path) as (process, report):
        disks = report["map"]["disks"]
        assert {disk["target"]: read(disk["uri"]) for disk in disks} == made.images[-1]
        assert report["map"]["keeper"] == process.pid
        process.send_signal(signum)
        out, err = process.communicate(timeout=SECONDS)
        assert (process.returncode, out, err) == (0, "", "")
    assert servers(ctl) == []


def test_a_kill_leaves_no_server_and_the_next_one_sweeps(ctl: Ctl, made: SetBuilder) -> None:
    with in_front(ctl, made.path) as (process, _):
        assert len(servers(ctl)) == 2
        process.kill()
        process.communicate(timeout=SECONDS)
    wait_for(lambda: servers(ctl) == [])
    assert len(list((ctl.runtime / "map").glob("*/*.sock"))) == 2
    assert ctl("map", "--list").stdout == "nothing is mapped\n"
    assert list((ctl.runtime / "map").glob("*/*")) == []


@contextlib.contextmanager
def idle_client(disk: dict[str, Any]) -> Iterator[None]:
    """A client that is connected and asks for nothing, as the kernel's is."""
    client = nbd.NBD()
    client.connect_unix(disk["socket"])
    client.pread(512, 0)
    yield
    with contextlib.suppress(nbd.Error):
        client.shutdown()


def test_clients_that_stay_keep_nothing_alive(ctl: Ctl, made: SetBuilder) -> None:
    """nbdkit, asked to end, waits for its clients (1.32)."""
    for signum, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 0)):
        with (
            in_front(ctl, made.path) as (process, report),
            idle_client(report["map"]["disks"][0]),
        ):
            begun = time.monotonic()
            process.send_signal(signum)
            process.communicate(timeout=SECONDS)
            wait_for(lambda: servers(ctl) == [])
            assert time.monotonic() - begun < 15
            assert process.returncode == code
    report = ctl("map", made.path, "--detach", "--json").json
    with idle_client(report["map"]["disks"][1]):
        ctl("unmap", "--all")
        assert servers(ctl) == []


def test_only_the_owner_may_connect(ctl: Ctl, made: SetBuilder) -> None:
    report = ctl("map", made.path, "--detach", "--json").json
    for disk in report["map"]["disks"]:
        path = Path(disk["socket"])
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    if os.geteuid() == 0:
        argv = ["setpriv", "--reuid=65534", "--clear-groups", "nbdinfo", disk["uri"]]
        done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60)
        assert "Permission denied" in done.stderr
    ctl("unmap", report["map"]["id"])


def test_detached_maps_go_on_until_they_are_ended(
    ctl: Ctl, made: SetBuilder, tmp_path: Path
) -> None:
    first = ctl("map", made.path, "-d", "vda", "--detach", "--json").json["map"]
    named = tmp_path / "named.sock"
    second = ctl("map", made.path, "-d", "vdb", "--socket", named, "--detach", "--json")
    third = ctl(
        "map", made.path, "--point", "point1", "--socket", tmp_path / "many", "--detach", "--json"
    ).json["map"]
    text = ctl("map", "--list").stdout
    assert text.count(str(made.path)) == 3
    listed = ctl("map", "--list", "--json").json["maps"]
    assert sorted(listed, key=lambda each: str(each["id"])) == sorted(
        [first, second.json["map"], third], key=lambda each: str(each["id"])
    )
    assert read(first["disks"][0]["uri"]) == made.images[1]["vda"]
    assert read(f"nbd+unix:///?socket={named}") == made.images[1]["vdb"]
    assert {path.name for path in (tmp_path / "many").iterdir()} == {"vda.sock", "vdb.sock"}
    for disk in third["disks"]:
        assert read(disk["uri"]) == made.images[0][disk["target"]]
    # one by its socket, one by its id, the rest by its set
    assert ctl("unmap", named, "--json").json["ended"] == [second.json["map"]["id"]]
    assert not named.exists()
    assert ctl("unmap", third["id"]).stdout == f"ended map {third['id']}\n"
    assert list((tmp_path / "many").iterdir()) == []
    assert read(first["disks"][0]["uri"]) == made.images[1]["vda"]
    # a server keeps the files of the set
    assert reading.take(made.path) is None
    ctl("unmap", made.path)
    assert reading.take(made.path) is not None
    assert "no map" in ctl("unmap", made.path, code=50).stderr


def test_unmap_ends_one_in_front_and_all(ctl: Ctl, made: SetBuilder) -> None:
    detached = ctl("map", made.path, "-d", "vdb", "--detach", "--json").json["map"]
    with in_front(ctl, made.path) as (process, report):
        ended = ctl("unmap", "--all", "--json").json["ended"]
        assert sorted(ended) == sorted([report["map"]["id"], detached["id"]])
        process.communicate(timeout=SECONDS)
        assert process.returncode == 0
    assert ctl("unmap", "--all", "--json").json["ended"] == []


def test_a_server_that_dies_is_told(ctl: Ctl, made: SetBuilder) -> None:
    with in_front(ctl, made.path, "-d", "vda") as (process, report):
        os.kill(report["map"]["disks"][0]["pid"], signal.SIGKILL)
        _, err = process.communicate(timeout=SECONDS)
        assert process.returncode == 30
        assert "nbdkit was killed by SIGKILL" in err
    report = ctl("map", made.path, "-d", "vda", "--detach", "--json").json
    os.kill(report["map"]["disks"][0]["pid"], signal.SIGKILL)
    wait_for(lambda: ctl("map", "--list", "--json").json["maps"] == [])


def test_writes_are_taken_and_forgotten(ctl: Ctl, made: SetBuilder) -> None:
    before = contents(made.path)
    with in_front(ctl, made.path, "-d", "vda", "--writable") as (process, report):
        uri = report["map"]["disks"][0]["uri"]
        argv = ["qemu-io", "-f", "raw", "-c", "write -P 7 4096 8192", "-c", "read -P 7 4096 8192"]
        done = subprocess.run([*argv, uri], check=True, capture_output=True, timeout=60)
        assert b"verification failed" not in done.stdout
        wanted = bytearray(made.images[-1]["vda"])
        wanted[4096 : 4096 + 8192] = b"\7" * 8192
        assert read(uri) == wanted
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=SECONDS)
    assert contents(made.path) == before
    with in_front(ctl, made.path, "-d", "vda") as (process, report):
        uri = report["map"]["disks"][0]["uri"]
        assert read(uri) == made.images[-1]["vda"]
        done = subprocess.run([*argv, uri], check=False, capture_output=True, timeout=60)
        assert b"verification failed" in done.stdout or done.returncode != 0
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=SECONDS)


def test_damage_that_was_met_is_told(ctl: Ctl, made: SetBuilder, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", made.path, copy], check=True)
    name = made.points[0].disk("vdb").file
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with in_front(ctl, copy, "-d", "vdb") as (process, report):
        argv = ["nbdcopy", report["map"]["disks"][0]["uri"], "null:"]
        assert subprocess.run(argv, check=False, capture_output=True).returncode != 0
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 40
    assert "disk vdb of a map: block" in err
    assert name in err


def free_port(count: int) -> int:
    """The first of some ports that were free a moment ago."""
    for _ in range(50):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            first = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            port: int = first.getsockname()[1]
            for more in range(1, count):
                stack.enter_context(socket.create_server(("127.0.0.1", port + more)))
            return port
    raise AssertionError("no free ports")


def test_tcp(ctl: Ctl, made: SetBuilder) -> None:
    port = free_port(2)
    place = f"127.0.0.1:{port}"
    report = ctl("map", made.path, "--tcp", place, "--insecure", "--detach", "--json").json
    assert report["warnings"] == []
    assert read(f"nbd://127.0.0.1:{port}") == made.images[-1]["vda"]
    assert read(f"nbd://127.0.0.1:{port + 1}") == made.images[-1]["vdb"]
    ctl("unmap", report["map"]["disks"][0]["uri"])


@pytest.mark.parametrize(
    ("address", "who"),
    [("127.0.0.1", "every account of this host"), ("[::1]", "every account of this host"),
     ("0.0.0.0", "everybody who reaches 0.0.0.0")],
)  # fmt: skip
def test_an_open_port_is_meant(ctl: Ctl, made: SetBuilder, address: str, who: str) -> None:
    """S-10: a port is open to every local account, so it takes a word."""
    place = f"{address}:{free_port(1)}"
    done = ctl("map", made.path, "-d", "vdb", "--tcp", place, "--detach", code=2)
    assert f"{who}" in done.stderr
    assert "--tls-psk, or --insecure" in done.stderr
    assert done.stderr.count("\n") == 1
    both = ("--insecure", "--tls-psk", "/nowhere")
    assert "give one of" in ctl("map", made.path, "--tcp", place, *both, code=2).stderr


def certificates(directory: Path) -> None:
    """A certificate authority, the server's and a client's certificate: see nbdkit-tls(1)."""
    directory.mkdir()
    key = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    key += ["-nodes", "-days", "2", "-keyout"]
    for words in (
        [*key, "ca-key.pem", "-out", "ca-cert.pem", "-subj", "/CN=authority"],
        *(
            [*key, f"{who}-key.pem", "-out", f"{who}-cert.pem", "-subj", "/CN=localhost",
             "-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-addext",
             "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:false"]
            for who in ("server", "client")
        ),
    ):  # fmt: skip
        subprocess.run(words, check=True, cwd=directory, capture_output=True, timeout=60)


def test_tls(ctl: Ctl, made: SetBuilder, tmp_path: Path) -> None:
    certificates(tmp_path / "tls")
    port = free_port(1)
    report = ctl(
        "map", made.path, "-d", "vdb", "--tcp", f"127.0.0.1:{port}",
        "--tls-certificates", tmp_path / "tls", "--detach", "--json",
    ).json  # fmt: skip
    uri = report["map"]["disks"][0]["uri"]
    assert uri == f"nbds://127.0.0.1:{port}"
    assert read(f"{uri}/?tls-certificates={tmp_path / 'tls'}") == made.images[-1]["vdb"]
    # S-10: neither without TLS nor without a certificate, nor with one of another authority
    assert not can_read(f"nbd://127.0.0.1:{port}")
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "tls/ca-cert.pem", tmp_path / "bare")
    assert not can_read(f"{uri}/?tls-certificates={tmp_path / 'bare'}")
    certificates(tmp_path / "other")
    shutil.copy(tmp_path / "tls/ca-cert.pem", tmp_path / "other")
    assert not can_read(f"{uri}/?tls-certificates={tmp_path / 'other'}")
    ctl("unmap", "--all")


def can_read(uri: str) -> bool:
    """Whether a client gets in."""
    done = subprocess.run(["nbdinfo", "--size", uri], check=False, capture_output=True, timeout=60)
    return done.returncode == 0


def test_tls_with_keys(ctl: Ctl, made: SetBuilder, tmp_path: Path) -> None:
    """S-10: a file of keys that nobody else may read, and clients that hold one of them."""
    keys, others = tmp_path / "keys", tmp_path / "others"
    keys.write_text(f"alice:{'0a' * 32}\n")
    others.write_text(f"alice:{'0b' * 32}\n")
    port = free_port(1)
    words = ("-d", "vdb", "--tcp", f"127.0.0.1:{port}", "--tls-psk", keys, "--detach", "--json")
    keys.chmod(0o644)
    assert "chmod 600" in ctl("map", made.path, *words, code=10).stderr
    keys.chmod(0o600)
    uri = ctl("map", made.path, *words).json["map"]["disks"][0]["uri"]
    mine = uri.replace("nbds://", "nbds://alice@")
    assert read(f"{mine}/?tls-psk-file={keys}") == made.images[-1]["vdb"]
    assert not can_read(f"{mine}/?tls-psk-file={others}")
    assert not can_read(f"nbd://127.0.0.1:{port}")
    ctl("unmap", "--all")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ((), 2, "takes a SOURCE, or --sequence"),
        (("SET", "--sequence", "/x"), 2, "/x is no file of"),
        (("SET", "--device", "/dev/sda", "-d", "vda"), 2, "is no NBD device"),
        (("SET", "--device", "/dev/nbd977", "-d", "vda"), 10, "modprobe nbd"),
        (("SET", "--tls-certificates", "/nowhere"), 2, "for --tcp only"),
        (("SET", "--tcp", "localhost:10809"), 2, "not an address and a port"),
        (("SET", "--tcp", "127.0.0.1:0"), 2, "not an address and a port"),
        (("SET", "-d", "vdz"), 50, "holds no disk vdz"),
        (("SET", "--point", "nothing"), 50, "no restore point"),
        (("SET", "-d", "vda", "--socket", f"/tmp/{'x' * 120}"), 10, "longer than 107 bytes"),
        (("SET", "-d", "vda", "--socket", "/tmp/a&b"), 10, "which QEMU misreads in a URI"),
        (("SET", "-d", "vda", "--socket", "/dev/null"), 50, "exists"),
        (("/nowhere/at/all",), 50, "/nowhere/at/all"),
    ],
)
def test_what_can_not_be(
    words: tuple[str, ...], code: int, says: str, ctl: Ctl, made: SetBuilder
) -> None:
    given = [str(made.path) if word == "SET" else word for word in words]
    done = ctl("map", *given, "--detach", code=code)
    assert says in done.stderr
    assert done.stdout == ""


def test_a_missing_nbdkit_is_told(ctl: Ctl, made: SetBuilder, tmp_path: Path) -> None:
    for name in ("python3", "setpriv"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    ctl.environment["PATH"] = str(tmp_path)
    for extra in ((), ("--detach",)):
        done = ctl("map", made.path, *extra, code=30)
        assert "program nbdkit was not found: install the package nbdkit" in done.stderr


def test_a_missing_plugin_is_told(ctl: Ctl, made: SetBuilder, tmp_path: Path) -> None:
    program = tmp_path / "nbdkit"
    # what a host without the plugin says: it has none of this name, either
    program.write_text(
        '#!/bin/sh\nfor word; do shift; [ "$word" != python ] || word=no-such-plugin\n'
        'set -- "$@" "$word"; done\nexec /usr/bin/nbdkit "$@"\n'
    )
    program.chmod(0o755)
    ctl.environment["PATH"] = f"{tmp_path}:{ctl.environment['PATH']}"
    for extra in ((), ("--detach",)):
        done = ctl("map", made.path, *extra, code=30)
        assert "install the package nbdkit-plugin-python" in done.stderr


def test_maps_of_others_are_left_to_them(ctl: Ctl, made: SetBuilder) -> None:
    from nbdbackupd.ops.map import map as maps

    request = maps.MapRequest(runtime_dir=ctl.runtime, source=made.path, purpose="boot")
    with maps.serving(request, cancelled=lambda: None) as up:
        done = ctl("unmap", up.mapping.id, code=2)
        assert f"process {os.getpid()}" in done.stderr
        assert ctl("unmap", "--all", "--json").json["ended"] == []
        assert mapped.known(ctl.runtime) == (up.mapping,)
