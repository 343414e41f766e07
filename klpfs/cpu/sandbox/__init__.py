"""The process in which module code runs. Nothing here may be imported by the daemon.

Model
    :mod:`~klpfs.cpu.sandbox.main` is the loop: messages in, one slice of one emulated thread, messages out.
    :mod:`~klpfs.cpu.sandbox.machine` owns engine, memory, threads and modules; the ``stubs_*`` modules are the kernel
    functions. :mod:`~klpfs.cpu.sandbox.confine` takes away what the process does not need, before any module arrives.

Locks
    None: one process, one thread. Emulated threads are switched between kernel calls and when their quantum is used up.
"""
