"""The daemon of a world: the emulated kernel, the FUSE server, and the supervisor of system calls.

Model
    It is forked before anything heavy is imported, and imports while the namespaces are made. Pid 1 sends it the
    mounted /dev/fuse with the procfs, the private tmpfs, and the seccomp listener, in this order; the front's end of
    its socket closes when the world has ended, and so does the daemon.

Locks
    One trio thread for the core; the threads of the driver and of the supervisor.

Source
    fs/fuse/dev.c: closing the descriptor aborts the connection, and all who wait get ECONNABORTED.
"""

from __future__ import annotations

import array
import errno
import gc
import logging
import os
import signal
import socket
import struct
import sys
from typing import TYPE_CHECKING

from klpfs.limits import raise_limits
from klpfs.world.options import EXIT_FAILED, Options

if TYPE_CHECKING:
    from klpfs.kernel.kallsyms import SymbolTable
    from klpfs.kernel.printk import Printk
    from klpfs.kernel.profile import Profile
    from klpfs.machine import Machine
    from klpfs.world.front import Signals

__all__ = ["main"]

log = logging.getLogger("klpfs.world")

_UCRED = struct.Struct("3i")

#: Directories of the host's sysfs whose content is shown beside the emulated kernel's.
_MERGED = ("sys/kernel", "sys/kernel/debug")


class _StartError(Exception):
    """The daemon cannot start; the message is for the user."""


def _detach(*keep: int) -> None:
    """Out of the session, so that the terminal's signals stay away, and without the command's descriptors."""
    os.setsid()
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(null, fd)
    low = 3
    for fd in [*sorted(fd for fd in keep if fd >= low), os.sysconf("SC_OPEN_MAX")]:
        os.closerange(low, fd)
        low = fd + 1


def _choose(options: Options) -> tuple[Profile, SymbolTable | None]:
    """The kernel to be, and the symbols of the one that was given (None: the shipped ones). Raises _StartError."""
    from klpfs.kernel.profile import profile
    from klpfs.world.libmodules import pick_release

    try:
        chosen = profile(options.kernel)
        release, table = options.release, None
        if options.kernel_image or options.kallsyms:
            from klpfs.elf.symbols import given_table

            table = given_table(options.kernel_image, options.kallsyms)
            release = release or table.release
        release = release or pick_release(chosen.name, chosen.release)
        return (chosen if release == chosen.release else profile(options.kernel, release=release)), table
    except ValueError as err:
        raise _StartError(str(err)) from None


def _open_log(path: str) -> int:
    try:
        # neither the opening nor a write may wait: a pipe may be nobody's, or full, and the kernel goes on
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
    except OSError as err:
        reason = "nobody reads from this pipe" if err.errno == errno.ENXIO else err.strerror
        raise _StartError(f"--log {path}: {reason}") from None


class _LogFile:
    """Copies the kernel log to a file as it grows. Where the file is a pipe that is full, the log waits in its ring
    buffer."""

    def __init__(self, printk: Printk, fd: int) -> None:
        import trio

        self._printk = printk
        self._fd = fd
        self._seq = 0
        self._rest = b""
        self._full = trio.Event()
        printk.listeners.append(self.copy)
        self.copy()

    def copy(self) -> None:
        """Write what is new."""
        from klpfs.kernel.kmsg import render_record

        if not self._rest:
            lines = []
            for record in self._printk.records(self._seq):
                lines.append(render_record(record) + "\n")
                self._seq = record.seq + 1
            self._rest = "".join(lines).encode("utf-8", "surrogateescape")
        try:
            while self._rest:
                self._rest = self._rest[os.write(self._fd, self._rest) :]
        except BlockingIOError:
            self._full.set()
        except OSError:
            self._printk.listeners.remove(self.copy)  # a full disk must not stop the kernel
            self._rest = b""

    async def run(self) -> None:
        """Go on whenever a full pipe has been read from."""
        import trio

        while True:
            await self._full.wait()
            self._full = trio.Event()
            await trio.lowlevel.wait_writable(self._fd)
            self.copy()  # the rest
            if not self._rest and self.copy in self._printk.listeners:
                self.copy()  # what has come since


def main(options: Options, to_front: socket.socket, to_init: socket.socket, signals: Signals) -> int:
    """The process's main function; the exit status."""
    raise_limits()
    log_fd, failure = -1, None
    if options.log is not None:
        try:
            log_fd = _open_log(options.log)  # here, as it may be one of the command's descriptors: /dev/stdout
        except _StartError as err:
            failure = err
    _detach(to_front.fileno(), to_init.fileno(), log_fd)
    signal.pthread_sigmask(signal.SIG_SETMASK, signals.mask)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="klpfs: %(name)s: %(message)s")
    try:
        gc.disable()  # a tenth of the time that imports take
        # what is wrong with an option is found out before trio is imported
        if failure is not None:
            raise failure
        kernel, table = _choose(options)
        import trio

        from klpfs.kernel.clock import parse_clock

        try:
            clock = parse_clock(options.clock)
        except ValueError as err:
            raise _StartError(f"--clock: {err}") from None
        os.chdir("/")
        daemon = _Daemon(options, kernel, table, to_front, to_init, log_fd)
        trio.run(daemon.run, clock=clock)
    except _StartError as err:
        _report(to_front, str(err))
        return EXIT_FAILED
    except BaseException as err:
        from klpfs.world.front import shortage

        why = shortage(err)
        if why is None:
            log.exception("the daemon failed")
            why = f"{type(err).__name__}: {err}"
        _report(to_front, f"the daemon failed: {why}")
        return EXIT_FAILED
    return 0


def _report(to_front: socket.socket, text: str) -> None:
    try:
        to_front.setblocking(True)
        to_front.send(b"E" + text.encode(errors="surrogateescape"), socket.MSG_NOSIGNAL)
    except OSError:
        pass


class _Daemon:
    """What runs under trio."""

    def __init__(
        self,
        options: Options,
        kernel: Profile,
        table: SymbolTable | None,
        to_front: socket.socket,
        to_init: socket.socket,
        log_fd: int,
    ) -> None:
        self.options = options
        self.kernel = kernel
        self.table = table
        self.to_front = to_front
        self.to_init = to_init
        self.log_fd = log_fd
        self.init_pid = 0

    async def run(self) -> None:
        """Boot, serve, and return when the front is gone."""
        import trio

        from klpfs.cpu.lazy import attach
        from klpfs.machine import open_machine

        async with open_machine(self.kernel, cpus=self.options.cpus, table=self.table) as machine:
            attach(machine)
            self._stand_ins(machine)
            async with trio.open_nursery() as nursery:
                if self.log_fd >= 0:
                    nursery.start_soon(_LogFile(machine.printk, self.log_fd).run)
                nursery.start_soon(self._serve, machine, nursery)
                await trio.lowlevel.wait_readable(self.to_front)
                # not worth an orderly end: nothing that outlives this process depends on one
                os._exit(0)

    # -- the tree -----------------------------------------------------------------------------------------------------

    def _stand_ins(self, machine: Machine) -> None:
        """Entries without permissions for what pid 1 binds there from the host."""
        for directory in _MERGED:
            self._stand_in(machine, directory)
        sysctls = machine.kernfs.make_path("proc/sys/kernel")
        if any(not os.path.exists(f"/{node.path()}") for node in sysctls.children()):
            self._stand_in(machine, "proc/sys/kernel")

    @staticmethod
    def _stand_in(machine: Machine, directory: str) -> None:
        from klpfs.kernfs import SeqFile

        kernfs = machine.kernfs
        try:
            entries = list(os.scandir(f"/{directory}"))
        except OSError:
            return  # not mounted, or not for this user
        node = kernfs.make_path(directory)
        for entry in entries:
            if node.get(entry.name) is not None or entry.is_symlink():
                continue
            if entry.is_dir():
                kernfs.create_dir(node, entry.name, 0)
            else:
                kernfs.create_file(node, entry.name, SeqFile(), 0)

    def _proc(self, machine: Machine, fd: int) -> None:
        """Make /proc the world's; *fd* is the procfs."""
        from klpfs.world.hostproc import HostProc
        from klpfs.world.mounts import HIDDEN
        from klpfs.world.procfs import WorldProc
        from klpfs.world.tasks import WorldTasks

        self.proc = proc = HostProc(fd)
        self.tasks = tasks = WorldTasks(machine.sched, proc)
        world = WorldProc(machine, proc, tasks)
        kernfs = machine.kernfs
        root = kernfs.make_path("proc")
        for name in ("proc", "run"):
            kernfs.make_path(f"proc/{HIDDEN}/{name}")
        root.provider = world
        machine.dev_alias = f"proc/{HIDDEN}/dev"
        emulated = machine.procfs
        emulated.task_of = lambda caller: tasks.ensure(caller.pid)
        profile, keep = self.kernel, self.options.keep_uname

        def host_file(name: str) -> bytes:
            if name == "version" and not keep:
                return profile.linux_banner.encode()
            try:
                return proc.read(name)
            except OSError:
                return b""

        emulated.host_file = host_file
        if keep:
            for name in ("osrelease", "version"):
                node = kernfs.lookup(f"proc/sys/kernel/{name}")
                if node is not None and node.ops is not None:
                    path = f"sys/kernel/{name}"
                    setattr(node.ops, "show", lambda caller, path=path: proc.read(path))  # noqa: B010
        machine.kmsg.size = 0  # as the device has; the supervisor sees seeks from the end

    @staticmethod
    def _devices(machine: Machine, fd: int) -> None:
        """Let pid 1 make the nodes of devices in /dev; *fd* is the socket on which it waits for that."""
        import trio

        sock, turn = socket.socket(fileno=fd), trio.Lock()
        sock.setblocking(False)
        os.set_inheritable(fd, False)

        async def ask(request: bytes) -> str:
            async with turn:
                try:
                    sock.send(request, socket.MSG_NOSIGNAL)
                    await trio.lowlevel.wait_readable(sock)
                    return sock.recv(4096).decode("utf-8", "replace").strip("\0")
                except OSError as err:
                    return str(err.strerror)

        async def dev_node(name: str, there: bool) -> str:
            answer = ""
            with trio.CancelScope(shield=True):  # an answer must not be left to whoever asks next
                answer = await ask((b"+" if there else b"-") + name.encode("utf-8", "surrogateescape"))
            return answer

        machine.dev_node = dev_node

    # -- what pid 1 sends ---------------------------------------------------------------------------------------------

    async def _serve(self, machine: Machine, nursery: object) -> None:
        import trio

        assert isinstance(nursery, trio.Nursery)
        while True:
            await trio.lowlevel.wait_readable(self.to_init)
            message, fds, sender = self._receive()
            if not message:
                return  # pid 1 has ended; the front says so in a moment
            if message == b"F":
                self.init_pid = sender
                self._proc(machine, fds[1])
                self._devices(machine, fds[2])
                await self._start_fuse(machine, nursery, fds[0])
            elif message == b"R":
                self.to_init.send(self.kernel.release.encode())
                # pid 1 is busy for a while, and then waits for the answer to its last message
                self._start_control(machine, nursery, fds[0])
            elif message == b"L":
                self._start_supervisor(machine, nursery, fds[0])
                self.to_init.send(b"G")
                gc.enable()
                gc.freeze()
            elif message == b"C":
                os.kill(os.getppid(), signal.SIGCONT)

    def _receive(self) -> tuple[bytes, list[int], int]:
        """One message of pid 1: its text, descriptors, and the sender's pid as it is known here."""
        room = socket.CMSG_SPACE(4 * 8) + socket.CMSG_SPACE(_UCRED.size)
        message, ancillary, flags, _address = self.to_init.recvmsg(64, room)
        if flags & socket.MSG_CTRUNC:  # the room suffices, so it is the number of descriptors that does not
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        fds = array.array("i")
        sender = 0
        for _level, kind, data in ancillary:
            if kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
            elif kind == socket.SCM_CREDENTIALS:
                sender = _UCRED.unpack(data)[0]
        return message, list(fds), sender

    async def _start_fuse(self, machine: Machine, nursery: object, fd: int) -> None:
        import trio

        from klpfs.drivers import Options as MountOptions
        from klpfs.drivers import get_driver
        from klpfs.world.readers import Readers
        from klpfs.world.vfs import WorldVfs

        assert isinstance(nursery, trio.Nursery)
        serve = get_driver("pyfuse3")
        procfs = f"/proc/self/fd/{self.proc.fd}"
        readers = Readers(self.proc)
        nursery.start_soon(readers.run)

        async def driver(*, task_status: trio.TaskStatus[None]) -> None:
            await serve(
                WorldVfs(machine.kernfs, self.tasks, readers, proc=procfs),
                f"/dev/fd/{fd}",
                options=MountOptions(proc=procfs),
                task_status=task_status,
            )

        await nursery.start(driver)

    def _start_control(self, machine: Machine, nursery: object, run: int) -> None:
        """The control socket, in a tmpfs that goes with the world."""
        import trio

        from klpfs.control.ops import Operations
        from klpfs.control.server import ControlServer, listen

        assert isinstance(nursery, trio.Nursery)
        sock = listen(f"/proc/self/fd/{run}/control")
        operations = Operations(machine, mountpoint="/", driver="pyfuse3", shutdown=lambda: None)
        nursery.start_soon(ControlServer(sock, operations).serve)

    def _start_supervisor(self, machine: Machine, nursery: object, fd: int) -> None:
        import trio

        from klpfs.drivers.common import Interrupts
        from klpfs.world.notify import Supervisor
        from klpfs.world.syscalls import Syscalls

        assert isinstance(nursery, trio.Nursery)
        interrupts = Interrupts(f"/proc/self/fd/{self.proc.fd}")
        nursery.start_soon(interrupts.run)
        calls = Syscalls(machine, self.proc, self.tasks, interrupts, init_pid=self.init_pid, traps=self.options.traps)
        supervisor = Supervisor(fd, nursery)
        calls.register(supervisor)
        supervisor.start()
