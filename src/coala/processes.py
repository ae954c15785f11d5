"""Work in another process of this machine, begun anew: what it tells, its error as a sentence, its end with ours.

Ctrl-C reaches every process of a terminal: here the one that began the others hears it alone, and ends them. SIGKILL
leaves children running: each of these watches the pipe from its parent and exits with it, so that a restarted run does
not race with what is left of the last. Knows nothing of the work.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from coala.values import CoalaError

_ENDED = "ended"


class Child:
    """``work(parent, *arguments)`` in a process begun anew, with a :class:`Parent`; a context manager that ends it.

    All of it must pickle by name. stdout leads nowhere there, stderr to ``errors`` (default: where ours does).
    """

    def __init__(self, work: Callable[..., object], *arguments: Any, errors: IO[bytes] | None = None) -> None:
        begin = f"import sys; sys.path[:] = {sys.path!r}; from coala.processes import _begin; _begin()"
        pipe = subprocess.PIPE
        with _deaf():
            self._process = subprocess.Popen([sys.executable, "-c", begin], stdin=pipe, stdout=pipe, stderr=errors)
        self._heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()
        self.ask(pickle.dumps((work, arguments)))

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        with suppress(OSError):
            self._to.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def _to(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    def ask(self, message: Any) -> None:
        """What :meth:`Parent.asked` gives there next."""
        with suppress(BrokenPipeError):  # it has ended, which hear() tells
            pickle.dump(message, self._to)
            self._to.flush()

    def hear(self, seconds: float | None = None) -> Any:
        """What is told next. Raises TimeoutError after ``seconds``, EOFError at its end, :class:`CoalaError` as its
        work did."""
        try:
            message = self._heard.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError from None
        if isinstance(message, CoalaError):
            raise message
        if message is _ENDED:
            self._heard.put(_ENDED)
            raise EOFError
        return message

    def told(self) -> Iterator[Any]:
        """All that is told until the process ends."""
        with suppress(EOFError):
            while True:
                yield self.hear()

    def join(self) -> int:
        """The exit code, once it has ended."""
        for _ in self.told():
            pass
        return self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        # A process that is killed may leave half a message.
        with self._process.stdout as pipe, suppress(EOFError, pickle.UnpicklingError):
            while True:
                self._heard.put(pickle.load(pipe))
        self._heard.put(_ENDED)


class Parent:
    """Whoever began this process, as seen from here."""

    def __init__(self) -> None:
        self._from, self._to = os.dup(0), os.fdopen(os.dup(1), "wb")
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1):
            os.dup2(nowhere, stream)
        self._asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._watch()

    def tell(self, message: Any) -> None:
        # Up to 4 KiB a pipe takes whole or not at all: who is killed at it leaves nothing half told.
        try:
            self._to.write(pickle.dumps(message))
            self._to.flush()
        except BrokenPipeError:
            os._exit(1)  # nobody is left to tell; the watcher was about to say so

    def asked(self) -> Any:
        """What :meth:`Child.ask` was given next; waited for."""
        return self._asked.get()

    def fork(self, work: Callable[..., int], *arguments: Any) -> int:
        """The pid of a copy of this process, whose exit code is what ``work`` returns; 2 if it raises.

        It may tell while this process waits for it, and ends with the parent too.
        """
        pid = os.fork()
        if pid:
            return pid
        code = 2
        # Nothing may go on here that the parent was doing, whatever is raised.
        try:
            self._watch()  # threads are not copied
            code = work(*arguments)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        os._exit(code)

    def _watch(self) -> None:
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        # A reader of its own: a copy of a reader that another thread held when this process was forked stays locked.
        with suppress(EOFError, pickle.UnpicklingError), open(self._from, "rb", closefd=False) as pipe:
            while True:
                self._asked.put(pickle.load(pipe))
        os._exit(1)


def _begin() -> None:
    parent = Parent()
    work, arguments = pickle.loads(parent.asked())
    try:
        work(parent, *arguments)
    except CoalaError as error:
        parent.tell(CoalaError(str(error)))
        sys.exit(1)


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes started now hear no Ctrl-C."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        # Blocked, not ignored: a Ctrl-C of this moment is heard now.
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
