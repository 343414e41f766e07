"""Execution of module code: real kernel modules for x86-64 run in an emulator, beside the daemon.

Model
    One *sandbox* process per machine executes the code of all its modules in one emulated kernel address space
    (:mod:`klpfs.cpu.space`), with ``unicorn`` as the engine, which only that process imports. Each entry into module
    code (init, exit, callback, work function, replaced function) is an emulated thread with registers and a stack of
    its own. Kernel functions that modules call are stubs (:mod:`klpfs.cpu.api`): traps that Python code in the sandbox
    answers, or that it passes on to the daemon as events. The daemon's side is :class:`klpfs.cpu.host.Cpu`, and
    :class:`klpfs.cpu.code.CpuCode` makes a module of it.

    What runs in the sandbox is not trusted: it has resource limits, no files, no network (a system call filter),
    budgets for instructions, kernel calls, log lines and memory. A fault ends the thread with a report for the kernel
    log.

Locks
    The daemon's side lives on the trio thread. A call into module code happens in the trio task that makes it, and so
    do the core functions that the code calls meanwhile, so that locks held by a caller are held by the same task.

Source
    The environment that the emulated code sees is that of Linux 6.12: arch/x86/kernel/{module,traps,dumpstack,
    unwind_orc}.c, kernel/module/main.c, lib/, mm/, kernel/{workqueue,printk,locking,sched}.
"""
