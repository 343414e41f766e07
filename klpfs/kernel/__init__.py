"""What the livepatch core leans on: a small kernel, one file for each part, under the kernel's names.

Model
    One emulated kernel is a set of plain objects owned by :class:`klpfs.machine.Machine`; nothing here is global, so
    that any number of kernels live side by side in one process.

Locks
    The kernel runs on one trio thread. Code between two ``await`` is atomic, which stands in for the kernel's spinlocks
    and RCU sections. Whatever may sleep is serialised by :class:`klpfs.kernel.locking.Mutex`, and every acquisition is
    seen by :class:`klpfs.kernel.locking.Lockdep`. Order: ``kn->active`` (an attribute operation in flight), then
    ``klp_mutex``, then ``module_mutex``; never backwards.

Source
    Each module names the kernel file it is modelled on. Linux 6.12 unless it says otherwise.
"""
