"""The table of kernel functions."""

from __future__ import annotations

import importlib
import subprocess
import sys

from klpfs.cpu.api import API, DATA, NATIVE, SUPPORTED, Kind

REQUIRED = [
    "__SCT__might_resched",
    "__fentry__",
    "__kmalloc_cache_noprof",
    "__kmalloc_noprof",
    "__list_add_valid_or_report",
    "__list_del_entry_valid_or_report",
    "__stack_chk_fail",
    "__task_pid_nr_ns",
    "__warn_printk",
    "__x86_indirect_thunk_rax",
    "__x86_return_thunk",
    "_printk",
    "cancel_delayed_work_sync",
    "complete",
    "console_printk",
    "const_pcpu_hot",
    "delayed_work_timer_fn",
    "flush_work",
    "jiffies",
    "kernel_kobj",
    "kfree",
    "klp_enable_patch",
    "klp_get_prev_state",
    "klp_get_state",
    "klp_shadow_alloc",
    "klp_shadow_free",
    "klp_shadow_free_all",
    "klp_shadow_get",
    "klp_shadow_get_or_alloc",
    "kmalloc_caches",
    "kobject_create_and_add",
    "kobject_put",
    "msleep",
    "mutex_lock",
    "mutex_unlock",
    "param_array_ops",
    "param_ops_bool",
    "param_ops_int",
    "queue_delayed_work_on",
    "queue_work_on",
    "seq_printf",
    "sprintf",
    "strcmp",
    "sysfs_create_file_ns",
    "system_wq",
    "system_percpu_wq",
    "wait_for_completion",
]


def test_what_the_samples_and_selftests_need_is_there() -> None:
    assert not [name for name in REQUIRED if name not in SUPPORTED]
    assert SUPPORTED["kfree"] is Kind.LOCAL
    assert SUPPORTED["klp_enable_patch"] is Kind.CORE
    assert SUPPORTED["jiffies"] is Kind.DATA
    assert len(API) > 500


def test_every_function_has_a_stub_and_every_stub_a_function() -> None:
    handlers = importlib.import_module("klpfs.cpu.sandbox.thread").HANDLERS
    for part in ("core", "data", "lib", "mem", "print", "probe", "stat", "sync", "system", "wait"):
        importlib.import_module(f"klpfs.cpu.sandbox.stubs_{part}")
    wanted = {api.stub for api in API.values() if api.kind is not Kind.NATIVE}
    assert set(handlers) == wanted


def test_functions_that_may_block_are_marked() -> None:
    for name in ("msleep", "mutex_lock", "wait_for_completion", "flush_work", "klp_enable_patch", "schedule"):
        assert API[name].blocks, name
    for name in ("kfree", "_printk", "mutex_trylock", "complete", "klp_shadow_get"):
        assert not API[name].blocks, name
    assert API["klp_shadow_alloc"].prototype == "ptr klp_shadow_alloc(ptr, ulong, size, uint, ptr, ptr)"


def test_variables_and_functions_do_not_share_names() -> None:
    assert not set(API) & set(DATA)
    assert all(len(code) < 16 for code in NATIVE.values())


def test_the_table_needs_no_engine() -> None:
    code = "import sys, klpfs.cpu.api, klpfs.cpu.lazy; sys.exit('unicorn' in sys.modules or 'msgspec' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
