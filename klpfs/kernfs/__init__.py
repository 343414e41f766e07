"""kernfs: the tree of directories, files and links behind every emulated sysfs, procfs and debugfs entry.

Model
    :class:`Kernfs` owns a tree of :class:`KernfsNode`. A file node carries a :class:`FileOps` (:class:`Attribute` for a
    one-page sysfs attribute, :class:`SeqFile` for text of any length, a subclass for a stream such as ``/dev/kmsg``).
    :class:`OpenFile` is what ``open`` yields. A *dynamic* directory asks a :class:`DirProvider` at each request.
    Nothing here knows FUSE: :class:`klpfs.kernfs.vfs.Vfs` answers file system requests on top of this, and the drivers
    of :mod:`klpfs.drivers` carry them.

Active references
    Each operation in flight on a node (open hook, show, store) holds an active reference. :meth:`Kernfs.remove` first
    marks a whole subtree dead, so that no new reference can be had, then waits for those held, child before parent,
    unlinks, and tells every listener; only then it returns. A ``store`` that awaits the removal of its own node would
    therefore wait for itself: the lock-order checker reports that before anything is marked, and without a checker it
    is a :class:`SelfRemovalError`.

Locks
    ``show`` may run in any thread and takes no core lock, only the open file's own buffer lock and, for an instant, the
    tree's reference lock (``Kernfs._lock``, which guards the reference counts and is never held across a call).
    Everything else runs on the trio thread. The class ``kn->active#<attribute name>`` stands for the active reference
    in the lock-order checker: a ``store`` (or an async show) reads it, a removal writes it.

Source
    fs/kernfs/{dir,file,inode}.c, fs/sysfs/{dir,file}.c, fs/seq_file.c.
"""

from klpfs.kernfs.files import (
    PAGE_SIZE,
    STREAM_SEEK_DATA,
    STREAM_SIZE,
    Attribute,
    Caller,
    FileOps,
    OpenFile,
    SeqFile,
    StreamOps,
)
from klpfs.kernfs.tree import (
    DirProvider,
    Entry,
    Kernfs,
    KernfsNode,
    Kind,
    Listener,
    LockChecker,
    SelfRemovalError,
    StaticProvider,
)

__all__ = [
    "PAGE_SIZE",
    "STREAM_SEEK_DATA",
    "STREAM_SIZE",
    "Attribute",
    "Caller",
    "DirProvider",
    "Entry",
    "FileOps",
    "Kernfs",
    "KernfsNode",
    "Kind",
    "Listener",
    "LockChecker",
    "OpenFile",
    "SelfRemovalError",
    "SeqFile",
    "StaticProvider",
    "StreamOps",
]
