"""Kernel versions as data: what each profile has, and that the core follows it."""

from __future__ import annotations

import pytest
from conftest import KLP, machine, read
from core_support import Run, make_patch

from klpfs.kernel.profile import DEFAULT_PROFILE, profile, profile_names, rules

ATTRIBUTES = {
    "seed": {"enabled", "transition", "force", "signal"},
    "5.1": {"enabled", "transition", "force"},
    "5.10": {"enabled", "transition", "force"},
    "6.1": {"enabled", "transition", "force"},
    "6.6": {"enabled", "transition", "force"},
    "6.12": {"enabled", "transition", "force", "replace"},
    "6.14": {"enabled", "transition", "force", "replace", "stack_order"},
}
PATCHED = {"6.1", "6.6", "6.12", "6.14"}


def test_the_names() -> None:
    assert profile_names()[0] == DEFAULT_PROFILE == "6.12"
    assert set(profile_names()) >= set(ATTRIBUTES)
    with pytest.raises(ValueError, match=r"'9\.9' is unknown: choose one of 6\.12, "):
        profile("9.9")


@pytest.mark.parametrize("kernel", ATTRIBUTES)
def test_the_attributes_of_a_patch(run: Run, kernel: str) -> None:
    async def main() -> None:
        async with machine(kernel) as m:
            await m.livepatch.klp_enable_patch(make_patch(m, "fix", {"vmlinux": ["once"]}))
            node = m.kernfs.lookup(f"{KLP}/fix")
            assert node is not None
            assert {c.name for c in node.children() if c.kind == "file"} == ATTRIBUTES[kernel]
            assert (m.kernfs.lookup(f"{KLP}/fix/vmlinux/patched") is not None) == (kernel in PATCHED)
            task = m.sched.spawn("t")
            assert m.kernfs.lookup(f"proc/{task.pid}/patch_state") is not None

    run(main)


def test_modes_of_the_attributes_that_are_rare(run: Run) -> None:
    async def main() -> None:
        for kernel, name, mode in (("seed", "signal", 0o200), ("6.14", "stack_order", 0o444)):
            async with machine(kernel) as m:
                await m.livepatch.klp_enable_patch(make_patch(m, "fix", {"vmlinux": ["once"]}))
                node = m.kernfs.lookup(f"{KLP}/fix/{name}")
                assert node is not None
                assert node.mode == mode

    run(main)


def test_kernels_that_unpack_modules_say_from_what(run: Run) -> None:
    async def main() -> None:
        async with machine("6.12") as m:
            assert await read(m, "sys/module/compression") == "xz"
        async with machine("5.10") as m:
            assert m.kernfs.lookup("sys/module/compression") is None

    run(main)


@pytest.mark.parametrize(
    ("rule", "holding"),
    [
        ("stack_order_enforced", {"seed"}),
        ("signals_by_itself", {"5.1", "5.10", "6.1", "6.6", "6.12", "6.14"}),
        ("atomic_replace", {"5.1", "5.10", "6.1", "6.6", "6.12", "6.14"}),
        ("free_on_disable", {"seed", "5.1", "5.10", "6.1", "6.6", "6.12", "6.14"}),
        ("ftrace_permanent", {"5.10", "6.1", "6.6", "6.12", "6.14"}),
        ("system_states", {"5.10", "6.1", "6.6", "6.12", "6.14"}),
        ("force_pins_all", {"seed", "5.1", "5.10"}),
    ],
)
def test_which_rule_holds_where(rule: str, holding: set[str]) -> None:
    assert {name for name in ATTRIBUTES if profile(name).has(rule)} == holding


def test_every_rule_names_its_commits() -> None:
    for name, rule in rules().items():
        assert rule.commit, name
        assert (rule.until is None) == (rule.until_commit is None), name


def test_a_name_that_is_no_rule() -> None:
    with pytest.raises(KeyError, match="nosuch"):
        profile().has("nosuch")


def test_releases() -> None:
    assert profile(release="6.12.9-mine").release == "6.12.9-mine"
    assert profile(release="6.12.9-mine").vermagic == "6.12.9-mine SMP preempt mod_unload modversions "
    assert profile().vermagic.startswith(f"{profile().release} ")
