"""Programs: real ones, since nothing else dies like them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nbdbackupd import proc
from nbdbackupd.errors import ProcessError

pytestmark = pytest.mark.component


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # gone before, or while it is read
        return False
    return state != "Z"


def test_children_die_with_a_killed_parent() -> None:
    program = (
        "import sys\n"
        "from nbdbackupd import proc\n"
        "with proc.spawn(['sleep', '60']) as child:\n"
        "    print(child.pid, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        # setpriv may not have become sleep yet
        deadline = time.monotonic() + 20
        while Path(f"/proc/{child}/comm").read_text() != "sleep\n":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        parent.kill()
    deadline = time.monotonic() + 20
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_children_make_is_ours_alone(tmp_path: Path) -> None:
    """S-9: whatever our umask is; the administrator's programs have it as it is."""
    old = os.umask(0)
    try:
        proc.output(["touch", tmp_path / "mine"], timeout=10)
        with proc.spawn(["touch", tmp_path / "theirs"], umask=proc.INHERITED) as child:
            child.wait(10)
    finally:
        os.umask(old)
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "theirs").stat().st_mode & 0o777 == 0o666


def test_output_and_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert proc.output(["cat"], timeout=10) == ""
    big = "ä" * 300_000
    assert proc.output(["cat"], timeout=10, input=big) == big
    assert proc.output(["sh", "-c", "echo $LC_ALL $X"], timeout=10, env={"X": "1"}) == "C 1\n"
    assert proc.output(["printf", r"\377"], timeout=10) == "\udcff"
    assert proc.output(["sh", "-c", "echo a; exit 2"], timeout=10, ok=(0, 2)) == "a\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sh", "-c", "echo one >&2; echo two >&2; echo >&2; exit 3"], "status 3: two$"),
        (["sh", "-c", "kill -SEGV $$"], "killed by SIGSEGV$"),
        (["no-such-program"], "no-such-program was not found: is it installed"),
        (["/"], "program .* was not found"),
        (["sh", "-c", "printf 'a\\033[31mb' >&2; exit 1"], r"status 1: a\\x1b\[31mb$"),
        (["sh", "-c", "yes error >&2 | head -c 9000000; exit 1"], "did not end|error"),
    ],
)
def test_failures_are_told_apart(argv: list[str], message: str) -> None:
    with pytest.raises(ProcessError, match=message):
        proc.output(argv, timeout=5)


def test_what_is_no_program(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("words")
    path.chmod(0o755)
    with pytest.raises(ProcessError, match=r"text (can't be run|failed)"):
        proc.output([path], timeout=5)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ProcessError, match="install the package qemu-utils"):
        proc.output(["qemu-img", "--version"], timeout=1)


def test_timeout_kills_the_whole_group(tmp_path: Path) -> None:
    script = f"sleep 60 & echo $! > {tmp_path}/pid; wait"
    begin = time.monotonic()
    with pytest.raises(ProcessError, match=r"sh did not end within 0\.5 s"):
        proc.output(["sh", "-c", script], timeout=0.5)
    assert time.monotonic() - begin < 30
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_output_is_bounded() -> None:
    with pytest.raises(ProcessError, match="wrote more than 1000 bytes"):
        proc.output(["yes"], timeout=10, max_output=1000)


def test_exception_of_the_caller_kills() -> None:
    seen = 0

    def run() -> None:
        nonlocal seen
        with proc.spawn(["sleep", "60"]) as child:
            seen = child.pid
            assert child.poll() is None
            child.check()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert not is_running(seen)


def test_stubborn_program_is_killed_after_the_grace(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    argv = ["sh", "-c", f"trap '' TERM; touch {ready}; sleep 60; sleep 60"]
    begin = time.monotonic()
    with proc.spawn(argv, grace_seconds=0.3) as child:
        while not ready.exists() and time.monotonic() - begin < 30:
            time.sleep(0.01)
    assert not is_running(child.pid)
    assert time.monotonic() - begin < 30


def test_death_is_noticed_with_last_words() -> None:
    with proc.spawn(["sh", "-c", "echo dying >&2; exit 4"]) as child:
        with pytest.raises(ProcessError, match="status 4: dying"):
            child.wait(10)
        with pytest.raises(ProcessError, match="status 4: dying"):
            child.check()
        assert child.poll() == 4


def test_wait_has_a_deadline() -> None:
    with (
        proc.spawn(["sleep", "60"]) as child,
        pytest.raises(ProcessError, match=r"did not end within 0\.1 s"),
    ):
        child.wait(0.1)


def test_stderr_never_blocks_the_program() -> None:
    script = "head -c 3000000 /dev/zero | tr '\\0' x >&2; echo >&2; echo last >&2"
    with proc.spawn(["sh", "-c", script]) as child:
        assert child.wait(20) == 0
        assert str(child.failure(1)).endswith(": last")


def test_last_words_are_short() -> None:
    with pytest.raises(ProcessError) as caught:
        proc.output(["sh", "-c", "head -c 9000 /dev/zero | tr '\\0' x >&2; exit 1"], timeout=10)
    assert len(str(caught.value)) < 400


def test_descriptors_and_pipes() -> None:
    reading, writing = os.pipe()
    try:
        with proc.spawn(
            ["sh", "-c", f"echo hello > /dev/fd/{writing}"], pass_fds=[writing]
        ) as child:
            child.wait(10)
        assert os.read(reading, 100) == b"hello\n"
    finally:
        os.close(reading)
        os.close(writing)
    with proc.spawn(["echo", "x"], pipe_stdout=True) as child:
        assert child.stdout is not None
        assert child.stdout.read() == b"x\n"


INTERRUPTED = """
import sys
from nbdbackupd import proc
with proc.spawn(["sh", "-c", "trap 'echo INT; exit' INT; echo $$; sleep 60 & wait"],
                stdout=1):
    try:
        proc.output(["sleep", "60"], timeout=60)
    except KeyboardInterrupt:
        print("cleaning", flush=True)
"""


def test_interrupt_of_the_terminal_reaches_us_alone() -> None:
    ours = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
    )
    assert ours.stdout is not None
    with ours.stdout:
        pid = int(ours.stdout.readline())
        time.sleep(0.3)
        os.killpg(ours.pid, signal.SIGINT)
        assert ours.stdout.read() == "cleaning\n"
    assert ours.wait(10) == 0
    assert not is_running(pid)


def test_descriptors_reach_the_program() -> None:
    reader, writer = os.pipe()
    try:
        proc.output(
            ["sh", "-c", f"echo word >/proc/self/fd/{writer}"], timeout=5, pass_fds=[writer]
        )
        assert os.read(reader, 100) == b"word\n"
    finally:
        os.close(reader)
        os.close(writer)


def test_what_must_finish_outlives_a_killed_parent(tmp_path: Path) -> None:
    begun, done = tmp_path / "begun", tmp_path / "done"
    script = f"echo >{begun}; sleep 0.5; echo >{done}"
    program = (
        f"from nbdbackupd import proc\n"
        f"proc.output(['sh', '-c', {script!r}], timeout=20, must_finish=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as parent:
        wait_for(begun)
        parent.kill()
    assert not done.exists()
    wait_for(done)


def test_what_must_finish_outlives_its_deadline(tmp_path: Path) -> None:
    done = tmp_path / "done"
    with pytest.raises(ProcessError, match=r"sh did not end within 0\.1 s and goes on"):
        proc.output(["sh", "-c", f"sleep 0.5; echo >{done}"], timeout=0.1, must_finish=True)
    assert not done.exists()
    wait_for(done)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_a_program_said_is_printable() -> None:
    script = "printf 'a\\033[2Jb\\r\\n' >&2; exit 1"
    with pytest.raises(ProcessError) as caught:
        proc.output(["sh", "-c", script], timeout=10)
    assert caught.value.message.isprintable()
