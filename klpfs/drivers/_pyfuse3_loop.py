"""The event loop under pyfuse3: one thread that blocks in poll(2), and calls into trio.

Model
    pyfuse3 runs its session loop on whatever its module attribute ``trio`` offers. :class:`Loop` is that: its
    coroutines wait either for a request (then the loop polls /dev/fuse) or for a :class:`Call`, an async function
    that runs as a task on the trio thread. As many session coroutines exist as there are calls under way, and one
    more that waits for requests.

Threads
    :meth:`Loop.run` owns a thread. :meth:`Loop.stop` and the completion of calls come from the trio thread, through a
    deque and an eventfd.

Source
    pyfuse3's own ``asyncio.py``, which replaces the same attribute.
"""

from __future__ import annotations

import collections
import errno
import logging
import os
import select
import threading
import time
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

import pyfuse3
import trio

__all__ = ["Call", "Loop", "SyncCall"]

log = logging.getLogger("klpfs.drivers.pyfuse3")

T = TypeVar("T")

_Coro = Coroutine[Any, Any, Any]

MANY = 1 << 30


class _Call(Generic[T]):
    __slots__ = ("args",)

    def __init__(self, *args: object) -> None:
        self.args = args

    def __await__(self) -> Generator[_Call[T], T, T]:
        return (yield self)


class Call(_Call[T]):
    """Awaited in the driver thread: run ``await fn(*args)`` in a task on the trio thread; its result or exception."""

    __slots__ = ("fn",)

    def __init__(self, fn: Callable[..., Awaitable[T]], *args: object) -> None:
        super().__init__(*args)
        self.fn = fn


class SyncCall(_Call[T]):
    """Awaited in the driver thread: run ``fn(*args)`` between two tasks on the trio thread; its result or exception."""

    __slots__ = ("fn",)

    def __init__(self, fn: Callable[..., T], *args: object) -> None:
        super().__init__(*args)
        self.fn = fn


class _Readable:
    """Awaited in the driver thread: wait for a request on *fd*."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __await__(self) -> Generator[_Readable, None, None]:
        yield self


class _NoLock:
    """Stands for the lock by which session tasks take turns: on one thread they do so anyway."""

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(self, *exc: object) -> None:
        return None


class _Nursery:
    """Stands for the nursery of ``pyfuse3.main``: notes what it starts, and stays open until the loop ends it."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    async def __aenter__(self) -> _Nursery:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await _Readable(-1)

    def start_soon(self, fn: Callable[..., _Coro], *args: object, name: str = "") -> None:
        self.loop.session = lambda: fn(*args)


def _wait_until_gone(thread: threading.Thread) -> None:
    """Wait until the system has forgotten a thread that was joined.

    Joining waits for the Python part only; libfuse closes the thread's pipe after that, and loses it if the session is
    destroyed first. Gives up after a second.
    """
    end = time.monotonic() + 1
    while os.path.exists(f"/proc/self/task/{thread.native_id}") and time.monotonic() < end:
        time.sleep(0.0002)


class Loop:
    """pyfuse3's session loop in a thread. *nursery* runs the calls; create and use this on the trio thread."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.session: Callable[[], _Coro] | None = None
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._wake_lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._done: collections.deque[tuple[_Coro, Any, BaseException | None]] = collections.deque()
        self._idle: list[_Coro] = []
        self._parked: set[_Coro] = set()
        self._fd = -1
        self._stopping = False

    async def run_in_thread(self) -> None:
        """:meth:`run` in a thread that has ended when this returns. Not cancellable, see :meth:`stop`.

        The thread is a new one: libfuse keeps a pipe for each thread, which goes with the thread only.
        """
        done = trio.Event()
        errors: list[BaseException] = []

        def target() -> None:
            try:
                self.run()
            except BaseException as exc:  # noqa: BLE001 - it is raised where the thread is waited for
                errors.append(exc)
            finally:
                self._token.run_sync_soon(done.set)

        thread = threading.Thread(target=target, name="klpfs-pyfuse3", daemon=True)
        thread.start()
        await done.wait()
        thread.join()
        _wait_until_gone(thread)
        if errors:
            raise errors[0]

    # -- the driver thread ---------------------------------------------------------------------------------------------

    def _shim(self) -> types.SimpleNamespace:
        """What pyfuse3 uses of trio."""
        lowlevel = types.SimpleNamespace(
            wait_readable=_Readable,
            current_task=threading.current_thread,  # has a name
            current_trio_token=lambda: self._token,
            notify_closing=lambda fd: None,
        )
        return types.SimpleNamespace(
            lowlevel=lowlevel,
            Lock=_NoLock,
            open_nursery=lambda: _Nursery(self),
            ClosedResourceError=trio.ClosedResourceError,
        )

    def run(self) -> None:
        """Serve until the session ends or :meth:`stop`. Raises OSError if /dev/fuse cannot be read."""
        main = None
        # The attribute is an undocumented hook, which pyfuse3's own asyncio support uses, hence the ignores.
        previous = pyfuse3.trio  # type: ignore[attr-defined]
        try:
            pyfuse3.trio = self._shim()  # type: ignore[attr-defined]
            main = pyfuse3.main(MANY, 1)  # never ends a session coroutine for being idle, never starts one
            main.send(None)  # notes the session coroutine and waits
            self._serve()
        finally:
            for coro in [*self._idle, *self._parked]:
                coro.close()
            self._idle.clear()
            self._parked.clear()
            if main is not None:
                main.close()
            pyfuse3.trio = previous  # type: ignore[attr-defined]
            with self._wake_lock:
                os.close(self._wake)
                self._wake = -1

    def _serve(self) -> None:
        assert self.session is not None
        poller: select.poll | None = None
        idle, done, wake = self._idle, self._done, self._wake
        while True:
            if not idle:
                # all session coroutines are in calls: one more to take requests
                if not self._step(self.session(), None, None):
                    return
                if poller is None:
                    poller = select.poll()
                    poller.register(self._fd, select.POLLIN)
                    poller.register(wake, select.POLLIN)
            assert poller is not None
            for fd, _ in poller.poll():
                if fd != wake:
                    # _step, spelled out for the most frequent case: the request is answered at once
                    if idle:
                        coro = idle.pop()
                        try:
                            waits = coro.send(None)
                        except StopIteration:
                            return
                        if waits.__class__ is _Readable:
                            idle.append(coro)
                        else:
                            self._park(coro, waits)
                    continue
                os.eventfd_read(wake)
                while done:
                    coro, value, error = done.popleft()
                    self._parked.discard(coro)
                    if not self._step(coro, value, error):
                        return
                if self._stopping:
                    return

    def _step(self, coro: _Coro, value: Any, error: BaseException | None) -> bool:
        """Run *coro* until it waits; False once the session has ended."""
        try:
            waits = coro.send(value) if error is None else coro.throw(error)
        except StopIteration:
            return False
        if isinstance(waits, _Readable):
            self._fd = waits.fd
            self._idle.append(coro)
        else:
            self._park(coro, waits)
        return True

    def _park(self, coro: _Coro, call: _Call[Any]) -> None:
        self._parked.add(coro)
        try:
            self._token.run_sync_soon(self._start, coro, call)
        except trio.RunFinishedError:
            self._finish(coro, None, OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN)))

    # -- the trio thread -----------------------------------------------------------------------------------------------

    def _start(self, coro: _Coro, call: _Call[Any]) -> None:
        if isinstance(call, SyncCall):
            try:
                self._finish(coro, call.fn(*call.args), None)
            except Exception as exc:  # noqa: BLE001 - it is raised where the call is awaited
                self._finish(coro, None, exc)
            return
        assert isinstance(call, Call)
        try:
            self._nursery.start_soon(self._call, coro, call)
        except RuntimeError:  # the nursery is closed
            self._finish(coro, None, OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN)))

    async def _call(self, coro: _Coro, call: Call[Any]) -> None:
        value: Any = None
        error: BaseException | None = None
        try:
            value = await call.fn(*call.args)
        except trio.Cancelled:
            error = OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
            raise
        except Exception as exc:  # noqa: BLE001 - it is raised where the call is awaited
            error = exc
        finally:
            self._finish(coro, value, error)

    def _finish(self, coro: _Coro, value: Any, error: BaseException | None) -> None:
        self._done.append((coro, value, error))
        self._notify()

    def _notify(self) -> None:
        with self._wake_lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """Make :meth:`run` return soon. On the trio thread."""
        self._stopping = True
        self._notify()
