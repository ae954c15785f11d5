"""Work in other processes: what is told, how each ends, who is left when a parent is killed or interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from coala.processes import Child, Parent
from coala.values import CoalaError

from .waiting import PATIENCE, wait_for

HERE = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE / "src"), str(HERE)])}


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def add(parent: Parent, *numbers: int) -> None:
    for number in numbers:
        parent.tell(number)
    parent.tell(sum(numbers) + parent.asked())


def fail(parent: Parent, error: Exception) -> None:
    parent.tell("so far")
    raise error


def leave(_: Parent, code: int) -> None:
    print("nobody reads this", flush=True)  # as libraries do: messages must not be disturbed
    sys.exit(code)


def hang(parent: Parent) -> None:
    parent.tell((os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, ())))
    parent.asked()


def seven(path: Path) -> int:
    path.write_text(str(os.getpid()))
    return 7


def tells(parent: Parent) -> int:
    parent.tell(("from a fork", os.getpid()))
    return 3


def forks_teller(parent: Parent) -> None:
    for _ in range(2):
        pid = parent.fork(tells, parent)
        parent.tell(pid)
        parent.tell(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def wait_in_fork(path: Path) -> int:
    path.write_text(str(os.getpid()))
    signal.pause()
    return 0


def breaks(_: Path) -> int:
    raise ValueError("broken")


def forks(parent: Parent, work: Any, path: Path) -> None:
    pid = parent.fork(work, path)
    parent.tell(pid)
    parent.tell(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def test_what_is_asked_and_told_arrives_in_its_order() -> None:
    with Child(add, 1, 2) as child:
        child.ask(10)
        assert list(child.told()) == [1, 2, 13]
        assert child.join() == 0
        assert child.ended
        with pytest.raises(EOFError):
            child.hear()
        child.ask("nobody hears this")


def test_who_tells_nothing_is_waited_for_no_longer_than_said() -> None:
    with Child(hang) as child:
        child.hear()
        with pytest.raises(TimeoutError):
            child.hear(0.0)
    assert child.ended


def test_an_error_is_carried_back_as_its_sentence_and_any_other_is_an_exit_code() -> None:
    with Child(fail, CoalaError("Found A, expected B.")) as child:
        assert child.hear() == "so far"
        with pytest.raises(CoalaError, match="Found A, expected B"):
            child.hear()
        assert child.join() == 1
    with tempfile.TemporaryFile() as errors, Child(fail, ValueError("a fault of ours"), errors=errors) as child:
        assert list(child.told()) == ["so far"]
        assert child.join() == 1
        errors.seek(0)
        assert b"ValueError: a fault of ours" in errors.read()
    with Child(leave, 5) as child:
        assert (list(child.told()), child.join()) == ([], 5)


def test_a_killed_child_is_an_exit_code() -> None:
    with Child(hang) as child:
        pid, blocked = child.hear()
        assert pid == child.pid
        assert blocked == {signal.SIGINT}
        os.kill(pid, signal.SIGKILL)
        assert child.join() == -9
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_fork_does_its_work_and_nothing_else(tmp_path: Path) -> None:
    with Child(forks, seven, tmp_path / "pid") as child:
        pid = child.hear()
        assert child.hear() == 7
        assert pid == int((tmp_path / "pid").read_text()) != child.pid
    with tempfile.TemporaryFile() as errors, Child(forks, breaks, tmp_path, errors=errors) as child:
        child.hear()
        assert child.hear() == 2
        errors.seek(0)
        assert b"ValueError: broken" in errors.read()


def test_a_fork_tells_while_it_is_waited_for() -> None:
    with Child(forks_teller) as child:
        told = list(child.told())
    for pid, *rest in (sorted(told[:3], key=str), sorted(told[3:], key=str)):
        told_by_it = next(one for one in (pid, *rest) if isinstance(one, tuple))
        assert told_by_it[0] == "from a fork"
        assert {told_by_it[1], 3} == {one for one in (pid, *rest) if isinstance(one, int)}


HOLD = """
import sys
from pathlib import Path
from coala.processes import Child
from tests.test_processes import forks, hang, wait_in_fork

with Child(hang) as one, Child(forks, wait_in_fork, Path(sys.argv[1])) as other:
    print(one.hear()[0], other.pid, other.hear(), flush=True)
    one.hear()
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_none_outlives_its_parent_however_that_ends(tmp_path: Path, end: signal.Signals) -> None:
    """Children and what they forked; Ctrl-C is sent to all of a terminal's, and heard by the first alone."""
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "pid")],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert first.stdout is not None
    pids = [int(word) for word in first.stdout.readline().split()]
    assert len(pids) == 3
    assert all(map(alive, pids))
    (os.killpg if end == signal.SIGINT else os.kill)(first.pid, end)
    _, said = first.communicate(timeout=PATIENCE)
    wait_for(lambda: not any(map(alive, pids)))
    assert first.returncode == -end
    assert said.count("Traceback") == (end == signal.SIGINT)


def chatter(parent: Parent) -> None:
    parent.tell(os.getpid())
    while True:
        parent.tell("x" * 1000)


CHAT = """
import time
from coala.processes import Child
from tests.test_processes import chatter
if __name__ == "__main__":
    with Child(chatter) as child:
        print(child.hear(), flush=True)
        time.sleep(600)
"""


def test_who_is_telling_when_its_parent_dies_ends_without_a_word() -> None:
    told = {"env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen([sys.executable, "-c", CHAT], **told)  # type: ignore[call-overload]
    pid = int(first.stdout.readline())
    first.kill()
    _, said = first.communicate(timeout=PATIENCE)
    wait_for(lambda: not alive(pid))
    assert said == ""
