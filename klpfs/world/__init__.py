"""The world: a command runs where the emulated kernel's files and system calls are at their usual places.

Model
    Three processes of klpfs serve one command:

    ``front``
        The process the user started. It parses the options, forks the daemon, enters new user (when not root) and mount
        namespaces, forks pid 1, then waits: it passes signals on, stops and continues with the command, and takes the
        command's exit status for its own.
    ``init``
        Pid 1 of a new PID namespace. It mounts (FUSE over /proc, /sys/kernel, /sys/module and /dev/kmsg; an overlay at
        /lib/modules/RELEASE), starts the command behind a seccomp filter, and reaps. Its death ends the namespace.
    ``daemon``
        Outside the namespaces: the emulated kernel, the FUSE server and the supervisor of the filtered system calls.

    The namespaces go with their last process, and the mounts with them, so that there is nothing to clean up; every
    process of klpfs ends when one of the two others does.

    =====================  ======================================================================================
    :mod:`.options`        the command line, as data
    :mod:`.sysapi`         system calls that Python does not offer
    :mod:`.front`          the first process
    :mod:`.idmap`          users and groups of a world of an ordinary user
    :mod:`.initproc`       pid 1, and the start of the command
    :mod:`.mounts`         overlays
    :mod:`.libmodules`     /lib/modules/RELEASE
    :mod:`.bpf`            the seccomp filter
    :mod:`.notify`         seccomp user notifications: receive, answer, look at the caller
    :mod:`.syscalls`       what each supervised system call answers
    :mod:`.hostproc`       reading the world's processes through a procfs of their PID namespace
    :mod:`.tasks`          real processes as tasks of the emulated scheduler
    :mod:`.procfs`         /proc
    :mod:`.vfs`            file requests, in the name of the task that makes them
    :mod:`.readers`        signals to readers of /dev/kmsg that wait
    :mod:`.daemon`         the daemon
    =====================  ======================================================================================

Locks
    The core and every directory provider run on the daemon's trio thread. System calls are received by one thread of
    their own, which answers at once what needs no core, and hands the rest to trio, one task for each caller. Nothing
    in the daemon may use a path that leads into its own FUSE file system: a look at a process goes through its procfs
    entry by descriptor, and links found there are read, never followed.

Source
    namespaces(7), seccomp_unotify(2), fs/fuse/inode.c (a request names pids as the mounter's PID namespace does),
    kernel/pid.c (``alloc_pid``: numbers below 300 are not given out a second time), proc(5).
"""
