"""Kernel functions that enter something into lists of the kernel's: notifiers, devices, ksets, tasklets, signals.

Model
    The stubs read the structures and ask; :mod:`klpfs.cpu.devices` and :mod:`klpfs.cpu.files` keep what was entered.
    The blocks of the kernel's own notifier chains are linked in emulated memory, as those of a module's chains are.

Source
    kernel/{notifier,reboot,panic,softirq,signal}.c, kernel/module/main.c (``register_module_notifier``),
    drivers/base/core.c (``_dev_printk``, ``device_create``), drivers/char/misc.c, fs/char_dev.c, lib/kobject.c.
"""

from __future__ import annotations

from typing import Any

from klpfs.cpu import layout as L
from klpfs.cpu.sandbox.machine import Machine
from klpfs.cpu.sandbox.stubs_core import groups_of
from klpfs.cpu.sandbox.stubs_data import HEADS, NOTIFY_STOP_MASK, register_block, unregister_block
from klpfs.cpu.sandbox.stubs_mem import alloc
from klpfs.cpu.sandbox.thread import HANDLERS, Ask, Invoke, Sleep, Thread, signed, stub
from klpfs.cpu.sandbox.waiting import Steps

ENOMEM = 12
_MINOR_BITS = 20


# -- the kernel's notifier chains -------------------------------------------------------------------------------------


def _kernel_chain(kind: str, chain: str, register: str, unregister: str) -> None:
    def run(change: Any) -> Any:
        def steps(m: Machine, t: Thread, block: int) -> Steps:
            m.mem.check(block, 24, write=True)
            head = yield Ask("variable", [chain])
            return int(change(m, head + HEADS[kind], block))

        return steps

    HANDLERS[register], HANDLERS[unregister] = run(register_block), run(unregister_block)


_kernel_chain("blocking", "module_notify_list", "register_module_notifier", "unregister_module_notifier")
_kernel_chain("blocking", "reboot_notifier_list", "register_reboot_notifier", "unregister_reboot_notifier")


@stub("blocking_notifier_call_chain_robust")
def _call_chain_robust(m: Machine, t: Thread, chain: int, up: int, down: int, data: int) -> Steps:
    """Who was told *up* before somebody refused is told *down*."""
    answer, told, block = 0, [], m.mem.load(chain + HEADS["blocking"])
    while block and not answer & NOTIFY_STOP_MASK:
        following = m.mem.load(block + 8)
        answer = signed((yield Invoke(m.mem.load(block), (block, up, data))), 32)
        told.append(block)
        block = following
    if answer & NOTIFY_STOP_MASK:
        for block in told[:-1]:
            yield Invoke(m.mem.load(block), (block, down, data))
    return answer


# -- devices ----------------------------------------------------------------------------------------------------------


def _text(m: Machine, addr: int) -> bytes:
    return m.mem.cstring(addr, 256) if addr else b""


def _prefix(m: Machine, dev: int) -> bytes:
    """``dev_driver_string`` and ``dev_name``."""
    if not dev:
        return b"(NULL device *): "
    mem = m.mem
    name = _text(m, mem.get(dev, L.DEVICE_INIT_NAME) or mem.get(dev, L.KOBJECT_NAME)) or b"(null)"
    driver = b""
    for member in (L.DEVICE_DRIVER, L.DEVICE_BUS, L.DEVICE_CLASS):
        owner = mem.get(dev, member)
        if owner:
            driver = _text(m, mem.load(owner))
            break
    return driver + b" " + name + b": "


def _dev_print(name: str, level: int) -> None:
    def run(m: Machine, t: Thread, dev: int, text: bytes) -> int:
        line = _prefix(m, dev) + text
        m.print(t, b"\x01%d" % level + line)
        return len(line)

    HANDLERS[name] = run


for _level, _name in enumerate(
    ("_dev_emerg", "_dev_alert", "_dev_crit", "_dev_err", "_dev_warn", "_dev_notice", "_dev_info")
):
    _dev_print(_name, _level)


@stub("_dev_printk")
def _dev_printk(m: Machine, t: Thread, level: bytes, dev: int, text: bytes) -> None:
    m.print(t, level + _prefix(m, dev) + text)


@stub("__dynamic_dev_dbg")
def _dynamic_dev_dbg(m: Machine, t: Thread, descriptor: int, dev: int, text: bytes) -> Steps:
    m.mem.check(descriptor, L.DDEBUG_SIZE)
    m.count_log(t.module)
    yield Ask("pr_debug", [descriptor, _prefix(m, dev) + text])
    return None


@stub("misc_register")
def _misc_register(m: Machine, t: Thread, misc: int) -> Steps:
    mem = m.mem
    mem.check(misc, L.MISC_SIZE, write=True)
    minor = signed(mem.get(misc, L.MISC_MINOR), 32)
    name, fops, mode = mem.get(misc, L.MISC_NAME), mem.get(misc, L.MISC_FOPS), mem.get(misc, L.MISC_MODE)
    if fops:
        mem.check(fops, L.FOPS_SIZE)
    groups = mem.get(misc, L.MISC_GROUPS)
    found = (yield from groups_of(m, misc, groups)) if groups else []
    answer = yield Ask("misc_register", [misc, _text(m, name), minor, fops, mode, found])
    if not isinstance(answer, list):
        return int(answer)
    mem.put(misc, L.MISC_MINOR, answer[0])
    mem.put(misc, L.MISC_THIS_DEVICE, answer[1])
    return 0


@stub("misc_deregister")
def _misc_deregister(m: Machine, t: Thread, misc: int) -> Steps:
    m.mem.check(misc, L.MISC_SIZE, write=True)
    dynamic = yield Ask("misc_deregister", [misc])
    if dynamic < 0:
        m.warn(t, "drivers/char/misc.c:275")
    elif dynamic:
        m.mem.put(misc, L.MISC_MINOR, 255)
    return None


@stub("alloc_chrdev_region")
def _alloc_chrdev_region(m: Machine, t: Thread, where: int, minor: int, count: int, name: bytes) -> Steps:
    m.mem.check(where, 4, write=True)
    major = int((yield Ask("chrdev_region", [0, minor, count, name])))
    if major < 0:
        return major
    m.mem.store(where, major << _MINOR_BITS | minor, 4)
    return 0


@stub("register_chrdev_region")
def _register_chrdev_region(m: Machine, t: Thread, dev: int, count: int, name: bytes) -> Steps:
    minor = dev & (1 << _MINOR_BITS) - 1
    answer = int((yield Ask("chrdev_region", [dev >> _MINOR_BITS, minor, count, name])))
    return min(answer, 0)


@stub("unregister_chrdev_region")
def _unregister_chrdev_region(m: Machine, t: Thread, dev: int, count: int) -> Steps:
    yield Ask("chrdev_region_free", [dev >> _MINOR_BITS, dev & (1 << _MINOR_BITS) - 1])
    return None


@stub("__register_chrdev")
def _register_chrdev(m: Machine, t: Thread, major: int, minor: int, count: int, name: bytes, fops: int) -> Steps:
    m.mem.check(fops, L.FOPS_SIZE)
    answer = int((yield Ask("chrdev_region", [major, minor, count, name])))
    if answer < 0:
        return answer
    yield Ask("cdev_add", [0, fops, answer << _MINOR_BITS | minor, count])
    return 0 if major else answer


@stub("__unregister_chrdev")
def _unregister_chrdev(m: Machine, t: Thread, major: int, minor: int, count: int, name: int) -> Steps:
    yield Ask("cdev_del_at", [major << _MINOR_BITS | minor])
    yield Ask("chrdev_region_free", [major, minor])
    return None


@stub("cdev_init")
def _cdev_init(m: Machine, t: Thread, cdev: int, fops: int) -> None:
    m.mem.write(cdev, bytes(L.CDEV_SIZE))
    m.mem.store(cdev + 80, cdev + 80)
    m.mem.store(cdev + 88, cdev + 80)
    HANDLERS["kobject_init"](m, t, cdev, 0)
    m.mem.put(cdev, L.CDEV_OPS, fops)


@stub("cdev_alloc")
def _cdev_alloc(m: Machine, t: Thread) -> int:
    cdev = alloc(m, t, L.CDEV_SIZE, 0x100)
    if cdev:
        _cdev_init(m, t, cdev, 0)
    return cdev


@stub("cdev_add")
def _cdev_add(m: Machine, t: Thread, cdev: int, dev: int, count: int) -> Steps:
    m.mem.store(cdev + L.CDEV_DEV.offset, dev, 4)
    m.mem.store(cdev + L.CDEV_COUNT.offset, count, 4)
    answer = yield Ask("cdev_add", [cdev, m.mem.get(cdev, L.CDEV_OPS), dev, count])
    return int(answer)


@stub("cdev_del")
def _cdev_del(m: Machine, t: Thread, cdev: int) -> Steps:
    m.mem.check(cdev, L.CDEV_SIZE)
    yield Ask("cdev_del", [cdev])
    return None


@stub("class_create")
def _class_create(m: Machine, t: Thread, name: int) -> Steps:
    _text(m, name)
    cls = alloc(m, t, L.CLASS_SIZE, 0x100)
    if not cls:
        return -ENOMEM
    m.mem.store(cls, name)
    answer = int((yield Ask("class_add", [cls, _text(m, name)])))
    return answer or cls


@stub("class_register")
def _class_register(m: Machine, t: Thread, cls: int) -> Steps:
    answer = yield Ask("class_add", [cls, _text(m, m.mem.load(cls))])
    return int(answer)


@stub("class_destroy", "class_unregister")
def _class_destroy(m: Machine, t: Thread, cls: int) -> Steps:
    if 0 < cls < (1 << 64) - 4095:
        yield Ask("class_del", [cls])
    return None


@stub("device_create")
def _device_create(m: Machine, t: Thread, cls: int, parent: int, dev: int, data: int, name: bytes) -> Steps:
    m.mem.check(cls, L.CLASS_SIZE)
    groups = m.mem.get(cls, L.CLASS_DEV_GROUPS)
    found = (yield from groups_of(m, cls, groups)) if groups else []
    answer = yield Ask("device_create", [cls, dev, data, name, found])
    return int(answer)


@stub("device_destroy")
def _device_destroy(m: Machine, t: Thread, cls: int, dev: int) -> Steps:
    yield Ask("device_destroy", [cls, dev])
    return None


@stub("device_create_file")
def _device_create_file(m: Machine, t: Thread, dev: int, attr: int) -> Any:
    return HANDLERS["sysfs_create_file_ns"](m, t, dev, attr, 0)


@stub("device_remove_file")
def _device_remove_file(m: Machine, t: Thread, dev: int, attr: int) -> Any:
    return HANDLERS["sysfs_remove_file_ns"](m, t, dev, attr, 0)


# -- ksets ------------------------------------------------------------------------------------------------------------


@stub("kset_create_and_add")
def _kset_create(m: Machine, t: Thread, name: bytes, ops: int, parent: int) -> Steps:
    answer = yield Ask("kset_create", [name, parent])
    return int(answer)


@stub("kset_unregister")
def _kset_unregister(m: Machine, t: Thread, kset: int) -> Steps:
    if kset:
        yield Ask("kobject_del", [kset + L.KSET_KOBJ])
        yield Ask("kobject_put", [kset + L.KSET_KOBJ])
    return None


# -- tasklets: state bit 0 is TASKLET_STATE_SCHED, bit 1 TASKLET_STATE_RUN ---------------------------------------------


@stub("tasklet_setup")
def _tasklet_setup(m: Machine, t: Thread, tasklet: int, callback: int) -> None:
    m.mem.write(tasklet, bytes(40))
    m.mem.store(tasklet + 20, 1, 1)
    m.mem.store(tasklet + 24, callback)


@stub("tasklet_init")
def _tasklet_init(m: Machine, t: Thread, tasklet: int, function: int, data: int) -> None:
    m.mem.write(tasklet, bytes(40))
    m.mem.store(tasklet + 24, function)
    m.mem.store(tasklet + 32, data)


@stub("__tasklet_schedule", "__tasklet_hi_schedule")
def _tasklet_schedule(m: Machine, t: Thread, tasklet: int) -> Steps:
    m.mem.check(tasklet, 40, write=True)
    yield Ask("tasklet_schedule", [tasklet])
    return None


@stub("tasklet_kill", "tasklet_unlock_wait")
def _tasklet_kill(m: Machine, t: Thread, tasklet: int) -> Steps:
    while m.mem.load(tasklet + 8) & 3:
        yield Sleep("D", L.NSEC_PER_JIFFY)
    return None


# -- signals of kernel threads ----------------------------------------------------------------------------------------


@stub("kernel_sigaction")
def _kernel_sigaction(m: Machine, t: Thread, sig: int, handler: int) -> Steps:
    # SIG_KTHREAD and SIG_KTHREAD_KERNEL (2, 3) let it in, SIG_DFL and SIG_IGN do not
    yield Ask("allow_signal", [t.task.info.pid, sig, handler in (2, 3)])
    return None


@stub("flush_signals")
def _flush_signals(m: Machine, t: Thread, task: int) -> None:
    flags = m.mem.get(task, L.TASK_THREAD_FLAGS)
    m.mem.put(task, L.TASK_THREAD_FLAGS, flags & ~(1 << L.TIF_SIGPENDING))


@stub("sched_set_fifo", "sched_set_fifo_low")
def _sched_set_fifo(m: Machine, t: Thread, task: int) -> None:
    m.mem.put(task, L.TASK_PRIO, 49)


@stub("sched_set_normal")
def _sched_set_normal(m: Machine, t: Thread, task: int, nice: int) -> None:
    m.mem.put(task, L.TASK_PRIO, 120 + max(-20, min(nice, 19)))


@stub("set_freezable")
def _set_freezable(m: Machine, t: Thread) -> bool:
    m.mem.put(t.task.addr, L.TASK_FLAGS, m.mem.get(t.task.addr, L.TASK_FLAGS) & ~0x8000)  # PF_NOFREEZE
    return False
