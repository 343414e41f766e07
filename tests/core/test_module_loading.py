"""Loading and removing modules: references, holders, symbols, taints, refusals (kernel/module/main.c)."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest
import trio
from conftest import insmod, insmod_errno, machine, read, write
from core_support import Bare, Run, image, refused

from klpfs.kernel.module import Export, ModuleImage
from klpfs.machine import Machine

IGNORE_MODVERSIONS, IGNORE_VERMAGIC = 1, 2


def log(m: Machine) -> list[str]:
    """The kernel's log, but for the lines of the boot."""
    return [r.message for r in m.printk.records()][2:]


async def load(m: Machine, name: str, *modinfo: tuple[str, str], flags: int = 0, **more: Any) -> ModuleImage:
    """Load a module made in Python."""
    made = image(m, name, *modinfo, **more)
    await m.modules.load_module(made, flags=flags)
    return made


async def load_errno(m: Machine, name: str, *modinfo: tuple[str, str], flags: int = 0, **more: Any) -> str:
    """The name of the errno that loading it is refused with."""
    return await refused(m.modules.load_module, image(m, name, *modinfo, **more))


# -- references --------------------------------------------------------------------------------------------------------


def test_states_and_references_on_the_way(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            code = Bare()
            code.go_on = trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(m.modules.load_module, image(m, "mod", code=code, init_size=4096))
                await code.entered.wait()
                assert await read(m, "sys/module/mod/initstate") == "coming"
                assert await read(m, "sys/module/mod/refcnt") == "1"
                assert await read(m, "sys/module/mod/initsize") == "4096"
                assert await read(m, "proc/modules") == f"mod 20480 1 - Loading 0x{0:016x}"
                assert await refused(m.delete_module, "mod") == "EBUSY"
                code.go_on.set()
            assert await read(m, "sys/module/mod/initstate") == "live"
            assert await read(m, "sys/module/mod/refcnt") == "0"
            assert await read(m, "sys/module/mod/initsize") == "0"
            assert await read(m, "proc/modules") == f"mod 16384 0 - Live 0x{0:016x}"
            await m.delete_module("mod")
            assert await read(m, "proc/modules") == ""
            assert m.kernfs.lookup("sys/module/mod") is None

    run(main)


def test_holders(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            await load(m, "base", exports=[Export("f", 1, gpl=False), Export("g", 2, gpl=True)])
            await load(m, "one", undefined=[("f", False), ("g", False)])
            await load(m, "two", undefined=[("f", False)])
            assert await read(m, "sys/module/base/refcnt") == "2"
            assert "base 16384 2 two,one, Live" in await read(m, "proc/modules")
            holders = m.kernfs.lookup("sys/module/base/holders")
            assert holders is not None
            assert {c.name: c.target for c in holders.children()} == {"one": "../../one", "two": "../../two"}
            assert await refused(m.delete_module, "base") == "EAGAIN"
            await m.delete_module("one")
            await m.delete_module("two")
            assert holders.children() == []
            assert await read(m, "sys/module/base/refcnt") == "0"
            await m.delete_module("base")

    run(main)


@pytest.mark.parametrize("name", ["", "nosuch", "m" * 55, "m" * 56, "m" * 300])
def test_removing_what_is_not_there(run: Run, name: str) -> None:
    async def main() -> None:
        async with machine() as m:
            assert await refused(m.delete_module, name) == "ENOENT"

    run(main)


def test_removing_what_is_in_use(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            await load(m, "mod")
            mod = m.modules.modules["mod"]
            assert m.modules.try_module_get(mod)
            with pytest.raises(OSError, match="in use") as info:
                await m.delete_module("mod", os.O_NONBLOCK)
            assert info.value.errno == errno.EWOULDBLOCK
            assert not m.kernel.test_taint("R")
            await m.delete_module("mod", os.O_TRUNC)
            assert m.kernel.test_taint("R")
            assert log(m)[-1] == "Disabling lock debugging due to kernel taint"
            assert not m.modules.try_module_get(mod), "it is gone"

    run(main)


def test_a_module_without_an_exit_function_is_permanent(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            await load(m, "mod", has_exit=False)
            assert "mod 16384 0 [permanent], Live" in await read(m, "proc/modules")
            assert await refused(m.delete_module, "mod") == "EBUSY"
            await m.delete_module("mod", os.O_TRUNC)
            await load(m, "neither", has_exit=False, has_init=False)
            await m.delete_module("neither")

    run(main)


def test_one_name_twice(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            await load(m, "mod")
            assert await load_errno(m, "mod") == "EEXIST"
            await m.delete_module("mod")
            code = Bare()
            code.go_on = trio.Event()
            answers: list[str] = []

            async def second() -> None:
                answers.append(await load_errno(m, "mod"))

            for ret, expected in ((0, "EEXIST"), (-errno.EIO, "EBUSY")):
                code.ret = ret
                code.go_on = trio.Event()
                answers.clear()
                async with trio.open_nursery() as nursery:

                    async def first() -> None:
                        made = image(m, "mod", code=code)
                        if code.ret:
                            assert await refused(m.modules.load_module, made) == "EIO"
                        else:
                            await m.modules.load_module(made)

                    nursery.start_soon(first)
                    await trio.sleep(1)
                    nursery.start_soon(second)
                    await trio.sleep(60)
                    assert answers == [], "it waits for the outcome of the first"
                    code.go_on.set()
                assert answers == [expected]
                if ret == 0:
                    await m.delete_module("mod")

    run(main)


def test_an_init_that_fails_leaves_nothing(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            await load(m, "base", exports=[Export("f", 1, gpl=False)])
            code = Bare()
            code.ret = -errno.ENODEV
            assert await load_errno(m, "mod", code=code, undefined=[("f", False)]) == "ENODEV"
            assert m.modules.modules.keys() == {"base"}
            assert m.modules.modules["base"].refcnt == 0
            assert m.kernfs.lookup("sys/module/mod") is None

    run(main)


def test_an_init_that_answers_something_positive(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            code = Bare()
            code.ret = 3
            await load(m, "mod", code=code)
            assert log(m) == [
                "do_init_module: 'mod'->init suspiciously returned 3, it should follow 0/-E convention\n"
                "do_init_module: loading module anyway...",
                f"CPU: 0 UID: 0 PID: 1 Comm: insmod Not tainted {m.profile.release}",
                "Call Trace:",
                " <TASK>",
                " </TASK>",
            ]
            assert await read(m, "sys/module/mod/initstate") == "live"

    run(main)


@pytest.mark.parametrize(
    ("name", "shown"), [("a/b", "a!b"), ("\udcff\udcc3", "\udcff\udcc3"), ("\U0010ff80", "\U0010ff80")]
)
def test_names_of_any_bytes(run: Run, name: str, shown: str) -> None:
    async def main() -> None:
        async with machine() as m:
            await load(m, "base", exports=[Export("f", 1, gpl=False)])
            parts: Any = {"sections": [("x/y", 1), (".text", 2), ("z" * 300, 3)], "undefined": [("f", False)]}
            await load(m, name, ("srcversion", name), **parts)
            root = m.kernfs.lookup("sys/module")
            assert root is not None
            assert {c.name for c in root.children() if c.kind == "dir"} == {"base", shown}
            sections = m.kernfs.lookup(f"sys/module/{shown}/sections")
            assert sections is not None
            assert [c.name for c in sections.children()] == [".text"]
            assert await m.kernfs.read_file("proc/modules") != b""
            await m.delete_module(name)
            assert m.kernfs.lookup(f"sys/module/{shown}") is None

    run(main)


# -- symbols -----------------------------------------------------------------------------------------------------------


def test_unknown_symbols_are_all_named(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            undefined = [("a", False), ("_printk", False), ("weak", True), ("b", False)]
            assert await load_errno(m, "mod", undefined=undefined) == "ENOENT"
            assert log(m) == ["mod: Unknown symbol a (err -2)", "mod: Unknown symbol b (err -2)"]
            assert m.modules.modules == {}

    run(main)


def test_symbols_for_gpl_modules_only(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            await load(m, "base", exports=[Export("free", 1, gpl=False), Export("gpl", 2, gpl=True)])
            shared = {"undefined": [("gpl", False)]}
            assert await load_errno(m, "blob", ("license", "Proprietary"), **shared) == "ENOENT"
            assert log(m) == [
                "blob: module license 'Proprietary' taints kernel.",
                "Disabling lock debugging due to kernel taint",
                "blob: module license taints kernel.",
                "blob: Unknown symbol gpl (err -2)",
            ]
            await load(m, "blob", ("license", "Proprietary"), undefined=[("free", False)])
            assert await read(m, "sys/module/blob/taint") == "P"

    run(main)


def test_the_taint_of_a_proprietary_module_is_inherited(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            await load(m, "blob", ("license", "Proprietary"), exports=[Export("f", 1, gpl=False)])
            await load(m, "user", undefined=[("f", False)])
            assert log(m)[-1] == "user: module uses symbols f from proprietary module blob, inheriting taint."
            assert await read(m, "sys/module/user/taint") == "P"
            assert await load_errno(m, "mixed", undefined=[("klp_enable_patch", False), ("f", False)]) == "ENOENT"
            assert log(m)[-2:] == [
                "mixed: module using GPL-only symbols uses symbols f from proprietary module blob.",
                "mixed: Unknown symbol f (err -2)",
            ]

    run(main)


@pytest.mark.parametrize("late", [False, True])
def test_waiting_for_the_init_of_a_symbols_owner(run: Run, late: bool) -> None:
    async def main() -> None:
        async with machine() as m:
            code = Bare()
            code.go_on = trio.Event()
            async with trio.open_nursery() as nursery:
                made = image(m, "base", code=code, exports=[Export("f", 1, gpl=False)])
                nursery.start_soon(m.modules.load_module, made)
                await code.entered.wait()
                if late:
                    assert await load_errno(m, "user", undefined=[("f", False)]) == "EBUSY"
                    assert trio.current_time() == 30
                    assert log(m) == [
                        "user: gave up waiting for init of module base.",
                        "user: Unknown symbol f (err -16)",
                    ]
                else:
                    nursery.start_soon(m.modules.load_module, image(m, "user", undefined=[("f", False)]))
                    await trio.sleep(29)
                    assert "user" not in await read(m, "proc/modules"), "unformed modules are not shown"
                    assert m.modules.find_module("user") is None
                code.go_on.set()
            assert await read(m, "sys/module/base/refcnt") == ("0" if late else "1")

    run(main)


def test_the_same_export_twice(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            await load(m, "base", exports=[Export("f", 1, gpl=False)])
            assert await load_errno(m, "mod", exports=[Export("f", 1, gpl=False)]) == "ENOEXEC"
            assert await load_errno(m, "mod", exports=[Export("_printk", 1, gpl=False)]) == "ENOEXEC"
            assert log(m) == [
                "mod: exports duplicate symbol f (owned by base)",
                "mod: exports duplicate symbol _printk (owned by kernel)",
            ]

    run(main)


def test_symbol_versions(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with machine() as m:
            monkeypatch.setattr(type(m.kallsyms.table), "exported", lambda self, name: (0x1234, False))
            undefined = [("_printk", False)]
            release = ("vermagic", f"another {m.profile.vermagic_flags} ")
            layout = {"module_layout": 0x1234}
            await load(m, "good", release, undefined=undefined, versions={**layout, "_printk": 0x1234})
            assert await load_errno(m, "bad", undefined=undefined, versions={**layout, "_printk": 0x4321}) == "EINVAL"
            assert await load_errno(m, "none", undefined=undefined, versions={**layout, "other": 1}) == "EINVAL"
            assert await load_errno(m, "old", undefined=undefined, versions={"module_layout": 1}) == "ENOEXEC"
            assert log(m) == [
                "bad: disagrees about version of symbol _printk",
                "bad: Unknown symbol _printk (err -22)",
                "none: no symbol version for _printk",
                "none: Unknown symbol _printk (err -22)",
                "old: disagrees about version of symbol module_layout",
            ]
            m.kallsyms.check_versions = False  # the table of another build of the same kernel
            await load(m, "other", release, undefined=undefined, versions={"module_layout": 1, "_printk": 0x4321})
            await m.modules.load_module(
                image(m, "forced", undefined=undefined, versions={"_printk": 1}), flags=IGNORE_MODVERSIONS
            )
            assert log(m)[-2:] == [
                "forced: module_layout: kernel tainted.",
                "Disabling lock debugging due to kernel taint",
            ]
            assert await read(m, "sys/module/forced/taint") == "F"

    run(main)


# -- modinfo and taints ------------------------------------------------------------------------------------------------


def test_version_magic(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            ours = m.profile.vermagic
            other = f"6.11.0 {m.profile.vermagic_flags} "
            assert await load_errno(m, "mod", ("vermagic", other)) == "ENOEXEC"
            assert log(m) == [f"mod: version magic '{other}' should be '{ours}'"]
            await load(m, "versions", ("vermagic", other), versions={"x": 1})
            assert await load_errno(m, "flags", ("vermagic", "6.11.0 SMP "), versions={"x": 1}) == "ENOEXEC"
            assert not m.kernel.test_taint("F")
            await load(m, "forced", ("vermagic", other), flags=IGNORE_VERMAGIC)
            assert log(m)[-2:] == [
                "forced: bad vermagic: kernel tainted.",
                "Disabling lock debugging due to kernel taint",
            ]
            await load(m, "none", ("vermagic", ""))
            assert await read(m, "sys/module/none/taint") == "F"
            assert log(m)[-1] == "Disabling lock debugging due to kernel taint", "said once"

    run(main)


@pytest.mark.parametrize(
    ("modinfo", "signed", "letters", "lines"),
    [
        ({}, True, "", []),
        ({"intree": ""}, True, "O", ["mod: loading out-of-tree module taints kernel."]),
        (
            {"retpoline": ""},
            True,
            "",
            [
                "Spectre V2 : System may be vulnerable to spectre v2",
                "mod: loading module not compiled with retpoline compiler.",
            ],
        ),
        (
            {"staging": "Y"},
            True,
            "C",
            ["mod: module is from the staging directory, the quality is unknown, you have been warned."],
        ),
        ({"livepatch": "Y"}, True, "K", ["mod: tainting kernel with TAINT_LIVEPATCH"]),
        (
            {"license": ""},
            True,
            "P",
            [
                "mod: module license 'unspecified' taints kernel.",
                "Disabling lock debugging due to kernel taint",
                "mod: module license taints kernel.",
            ],
        ),
        ({"license": "Dual BSD/GPL"}, True, "", []),
        ({"test": "Y"}, True, "N", ["mod: loading test module taints kernel."]),
        (
            {},
            False,
            "E",
            ["mod: module verification failed: signature and/or required key missing - tainting kernel"],
        ),
    ],
)
def test_taints(run: Run, modinfo: dict[str, str], signed: bool, letters: str, lines: list[str]) -> None:
    async def main() -> None:
        async with machine() as m:
            await load(m, "mod", *modinfo.items(), signed=signed)
            assert await read(m, "sys/module/mod/taint") == letters
            assert log(m) == lines
            shown = (await read(m, "proc/modules")).split(" ", 6)[6:]
            assert shown == ([f"({letters})"] if letters else [])
            assert bool(int(await read(m, "proc/sys/kernel/tainted"))) == bool(letters)
            # once more: the kernel is tainted already
            await m.delete_module("mod")
            await load(m, "mod", *modinfo.items(), signed=signed)
            again = [line for line in lines if "Spectre" in line or "compiler" in line or "staging" in line]
            assert log(m) == lines + again

    run(main)


# -- parameters and attributes -----------------------------------------------------------------------------------------

PARAMS = """
name = "mod"
kind = "module"
[[params]]
name = "count"
type = "int"
perm = "0644"
default = 3
[[params]]
name = "flag"
type = "bool"
perm = "0444"
[[params]]
name = "hidden"
type = "charp"
perm = 0
[[params]]
name = "word"
type = "charp"
perm = "0600"
"""


@pytest.mark.parametrize(
    ("args", "number", "line"),
    [
        ("count=x", "EINVAL", "mod: `x' invalid for parameter `count'"),
        ("count", "EINVAL", "mod: `' invalid for parameter `count'"),
        ("count=99999999999", "ERANGE", "mod: `99999999999' invalid for parameter `count'"),
        ("flag=maybe", "EINVAL", "mod: `maybe' invalid for parameter `flag'"),
    ],
)
def test_parameters_that_are_refused(run: Run, args: str, number: str, line: str) -> None:
    async def main() -> None:
        async with machine() as m:
            assert await insmod_errno(m, PARAMS, args) == number
            assert line in log(m)
            assert m.modules.modules == {}
            assert m.kernfs.lookup("sys/module/mod") is None

    run(main)


def test_parameters(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            await insmod(m, PARAMS, 'count=0x10 flag nosuch=1 word="a b" -- for init')
            assert log(m)[-2:] == [
                "mod: unknown parameter 'nosuch' ignored",
                "mod: parameters 'for init' after `--' ignored",
            ]
            where = m.kernfs.lookup("sys/module/mod/parameters")
            assert where is not None
            assert {c.name: c.mode for c in where.children()} == {"count": 0o644, "flag": 0o444, "word": 0o600}
            values = [await read(m, f"sys/module/mod/parameters/{p}") for p in ("count", "flag", "word")]
            assert values == ["16", "Y", "a b"]
            await write(m, "sys/module/mod/parameters/count", "-5\n")
            assert await read(m, "sys/module/mod/parameters/count") == "-5"
            for value in ("5 5", " 5", "5 ", "x"):
                assert await refused(write, m, "sys/module/mod/parameters/count", value) == "EINVAL"
            assert await refused(write, m, "sys/module/mod/parameters/count", "2147483648") == "ERANGE"
            assert await read(m, "sys/module/mod/parameters/count") == "-5"

    run(main)


def test_attributes_of_a_module(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            await insmod(m, PARAMS)
            node = m.kernfs.lookup("sys/module/mod")
            assert node is not None
            names = {c.name: c.mode for c in node.children() if c.kind == "file"}
            assert names == {
                "coresize": 0o444,
                "initsize": 0o444,
                "initstate": 0o444,
                "refcnt": 0o444,
                "taint": 0o444,
                "uevent": 0o200,
            }
            assert {c.name for c in node.children() if c.kind == "dir"} >= {"holders", "parameters", "sections"}
            size = int(await read(m, "sys/module/mod/coresize"))
            assert size % 4096 == 0
            assert f"mod {size} 0 - Live" in await read(m, "proc/modules")
            await write(m, "sys/module/mod/uevent", "add")
            assert await refused(write, m, "sys/module/mod/uevent", "explode") == "EINVAL"

    run(main)


def test_empty_and_broken_files(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            assert await refused(m.init_module, b"") == "EINVAL"
            for data in (b"x", b"not an elf", b"\x7fELF", bytes(5000)):
                assert await refused(m.init_module, data) == "ENOEXEC"
            assert m.modules.modules == {}

    run(main)


def test_memory_is_used_again(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            first = await insmod(m, PARAMS)
            base = first.base
            await m.delete_module("mod")
            assert (await insmod(m, PARAMS)).base == base
            assert base >= 0xFFFFFFFFC0000000

    run(main)
