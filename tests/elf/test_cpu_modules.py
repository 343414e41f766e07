"""What ordinary modules do: timers, notifiers, devices, probes, functions that nobody can trace."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import trio
from cpu_support import TRACED, build, executing, lines

EXIT = "void cleanup_module(void) {}\n"


def loaded(m: Any, since: int) -> list[str]:
    """What modules logged."""
    return [line for line in lines(m, since) if "retpoline" not in line and "Spectre" not in line]


HRTIMER = r"""
struct base { void *cpu_base; u32 index; int clock; long pad[4]; u64 (*get_time)(void); long offset; };
struct hrtimer { long node[3]; u64 expires, softexpires; int (*function)(struct hrtimer *); struct base *base;
    u8 state, rel, soft, hard; };
void hrtimer_init(struct hrtimer *, int, int); void hrtimer_start_range_ns(struct hrtimer *, long, u64, int);
int hrtimer_cancel(struct hrtimer *); u64 hrtimer_forward(struct hrtimer *, u64, u64);
static struct hrtimer timer; static int runs;
"""


@pytest.mark.parametrize("clock", [0, 1, 7])
def test_an_hrtimer_runs_again_until_its_function_is_done(run: Any, clock: int) -> None:
    source = (
        HRTIMER
        + r"""
static int fire(struct hrtimer *t) {
    pr("run %d of clock %d\n", ++runs, t->base->clock);
    hrtimer_forward(t, t->base->get_time(), 20000000); /* what hrtimer_forward_now() does */
    return runs < 3;
}
int init_module(void) {
    hrtimer_init(&timer, CLOCK, 1);
    timer.function = fire;
    hrtimer_start_range_ns(&timer, 20000000, 0, 1);
    return 0;
}
void cleanup_module(void) { pr("active %d %d\n", hrtimer_cancel(&timer), hrtimer_cancel(&timer)); }
""".replace("CLOCK", str(clock))
    )

    async def main() -> None:
        async with executing() as (m, _):
            since, began = m.printk.next_seq, m.clock.now()
            await m.init_module(build("hr", source))
            await trio.sleep(1)
            times = [r.ts_usec / 1e6 - began for r in m.printk.records(since) if r.message.startswith("run ")]
            assert times == pytest.approx([0.02, 0.04, 0.06], abs=0.01)
            await m.delete_module("hr")
            number = 1 if clock == 0 else clock  # a relative time of CLOCK_REALTIME is one of CLOCK_MONOTONIC
            assert loaded(m, since) == [f"run {i} of clock {number}" for i in (1, 2, 3)] + ["active 0 0"]

    run(main)


def test_an_hrtimer_can_be_cancelled_by_its_module_while_it_repeats(run: Any) -> None:
    source = (
        HRTIMER
        + r"""
static int fire(struct hrtimer *t) { runs++; hrtimer_forward(t, t->base->get_time(), 10000000); return 1; }
int init_module(void) {
    hrtimer_init(&timer, 1, 1);
    timer.function = fire;
    hrtimer_start_range_ns(&timer, 10000000, 0, 1);
    msleep(100);
    pr("active %d\n", hrtimer_cancel(&timer));
    runs = 0;
    msleep(100);
    pr("runs %d\n", runs);
    return 0;
}
"""
    )

    async def main() -> None:
        async with executing() as (m, _):
            since = m.printk.next_seq
            await m.init_module(build("hr", source + EXIT))
            assert loaded(m, since) == ["active 1", "runs 0"]

    run(main)


def test_a_module_without_text_loads_and_cannot_be_removed(run: Any) -> None:
    data = build("bare", '__attribute__((section(".init.text"))) int init_module(void) { return 0; }', exit=False)

    async def main() -> None:
        async with executing() as (m, _):
            await m.init_module(data)
            with pytest.raises(OSError, match="no exit function") as refused:
                await m.delete_module("bare")
            assert refused.value.errno == errno.EBUSY

    run(main)


def test_symbols_of_the_init_part_last_as_long_as_it(run: Any) -> None:
    source = r"""
__attribute__((used)) static void after(void) { pr("later\n"); }
__attribute__((section(".init.text"))) int init_module(void) { pr("now %ps\n", init_module); return 0; }
void cleanup_module(void) {}
"""

    async def main() -> None:
        async with executing() as (m, _):
            since = m.printk.next_seq
            await m.init_module(build("early", source))
            assert loaded(m, since) == ["now init_module [early]"]
            names = {s.name for s in m.kallsyms.symbols_of("early")}
            assert "cleanup_module" in names
            assert "init_module" not in names

    run(main)


PLAIN = r"""
__attribute__((noinline)) int traced(int x) { return x; }
__attribute__((noinline, no_instrument_function)) int untraced(int x) { return x + 1; }
int init_module(void) { return 0; }
"""
PATCH = r"""
struct func { const char *old_name; void *new_func; u64 sympos; char pad[128]; };
struct object { const char *name; struct func *funcs; char pad[152]; };
struct patch { void *mod; struct object *objs; void *states; bool replace; char pad[175]; };
int klp_enable_patch(struct patch *);
static int new(int x) { return 0; }
static struct func funcs[2] = { { .old_name = "FUNCTION", .new_func = new } };
static struct object objs[2] = { { .name = "plain", .funcs = funcs } };
static struct patch patch = { .mod = &__this_module, .objs = objs };
INFO(livepatch, "Y")
int init_module(void) { return klp_enable_patch(&patch); }
"""


def test_a_function_without_an_ftrace_site_cannot_be_patched(run: Any) -> None:
    plain = build("plain", PLAIN + EXIT, TRACED)

    async def main() -> None:
        async with executing() as (m, _):
            await m.init_module(plain)
            since = m.printk.next_seq
            with pytest.raises(OSError, match="init answered -22") as refused:
                await m.init_module(build("lp", PATCH.replace("FUNCTION", "untraced") + EXIT))
            assert refused.value.errno == errno.EINVAL
            assert "livepatch: failed to find location for function 'untraced'" in lines(m, since)
            await m.init_module(build("lp2", PATCH.replace("FUNCTION", "traced") + EXIT))

    run(main)
