#!/usr/bin/env bash
# Unmodified programs in a world of their own, then a session on a mounted /sys/kernel/livepatch: every command is printed,
# run for real, and what it prints is checked.
# Needs klpfs in PATH (make demo sees to it). Exits with 0 only if everything was as it has to be.
set -euo pipefail
examples=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/klpfs-demo.XXXXXX")
cd "$work"
export PATH=$PATH:/usr/sbin:/sbin  # kmod is there, and not in every user's PATH
export XDG_RUNTIME_DIR=$work/run LC_ALL=C.UTF-8  # a registry of its own: other mounts do not matter
mkdir -m 700 run

clean_up() {
    cd /
    if mountpoint -q "$work/k" 2>/dev/null || ! stat "$work/k" >/dev/null 2>&1; then
        klpfs umount --lazy "$work/k" 2>/dev/null || true
    fi
    rm -rf --one-file-system "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

bold= dim= off=
if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then bold=$'\e[1m' dim=$'\e[2m' off=$'\e[0m'; fi

say() { printf '\n%s# %s%s\n' "$dim" "$*" "$off"; }
# run CMD: print and execute it; its output stays in $out, its status in $rc.
run() {
    printf '%s$ %s%s\n' "$bold" "$1" "$off"
    rc=0
    out=$(eval "$1" 2>&1 | sed -E "s#^$0: line [0-9]+: #bash: #") || rc=$?
    [ -z "$out" ] || printf '%s\n' "$out"
}
fail() {
    printf 'demo: %s\n' "$*" >&2
    exit 1
}
ok() { [ "$rc" = 0 ] || fail "that should have succeeded (exit status $rc)"; }
# prints TEXT: the last command succeeded and printed exactly this.
prints() {
    ok
    [ "$out" = "$1" ] || fail "expected exactly: $1"
}
# has TEXT: the last command printed a line with this in it.
has() { grep -qF -- "$1" <<<"$out" || fail "expected in the output: $1"; }
# within SECONDS CMD: wait for a condition.
within() {
    local end=$((SECONDS + $1))
    until eval "$2" 2>/dev/null; do
        [ $SECONDS -lt $end ] || fail "not within $1 s: $2"
        sleep 0.05
    done
}

ln -s "$examples" examples
ln -s examples/modules modules

say "A runbook that knows nothing of klpfs, in a world of its own: Debian's insmod, rmmod and dmesg meet an emulated kernel"
run "klpfs mkmod modules/{busy,busy_fix}.toml -o ."; prints ""
run "klpfs run -- examples/rehearsal.sh"; ok
has "livepatch_busy_fix: not complete after 2 s"; has "waits for"; has "busy_work_func"; has "exit status 1"
has "livepatch_busy_fix: enabled"; has "livepatch: 'livepatch_busy_fix': unpatching complete"
run "ls /sys/kernel/livepatch/livepatch_busy_fix"; [ "$rc" != 0 ] || fail "the world is still there"

say "An emulated kernel, mounted in an ordinary directory"
mkdir k
run "klpfs mount k"; ok
run "ls k"; prints $'dev\nproc\nsys'
run "ln -s k/sys/kernel/livepatch klp; ls klp"; prints ""
run "klpfs mkmod modules/cmdline.toml -o ."; prints ""
run "modinfo -F livepatch livepatch_cmdline.ko"; prints Y

say "A patch is enabled: /proc/cmdline comes from its new function"
run "head -c 60 k/proc/cmdline"; ok; [ "$out" != "livepatch_cmdline: this has been live patched" ] || fail "patched already"
run "klpfs insmod livepatch_cmdline.ko"; prints ""
P=klp/livepatch_cmdline
run "ls $P"; has vmlinux
run "cat $P/enabled $P/transition $P/vmlinux/patched"; prints $'1\n0\n1'
run "cat k/proc/cmdline"; prints "livepatch_cmdline: this has been live patched"

say "A second patch cannot complete: a worker sleeps in the function that it replaces"
run "klpfs insmod busy.ko block_transition=Y"; prints ""
run "klpfs insmod livepatch_busy_fix.ko"; prints ""
B=klp/livepatch_busy_fix
run "cat $B/enabled $B/transition"; prints $'1\n1'
run "klpfs status"; has "sleeps in busy_work_func"
run "grep -l '^0$' k/proc/*/patch_state"; ok
worker=${out#k/proc/} worker=${worker%/patch_state}
run "cat k/proc/$worker/comm k/proc/$worker/stack"; has busy_work_func
run "echo 0 > klp/livepatch_cmdline/enabled"; [ "$rc" = 1 ] || fail "two transitions at a time"; has "Device or resource busy"
run "klpfs rmmod livepatch_busy_fix"; [ "$rc" = 1 ] || fail "a patch in use was removed"; has "is in use"

say "The transition is reversed; the patch's directory goes"
run "echo 0 > $B/enabled"; prints ""
within 5 "[ ! -e $B ]"
run "ls klp"; prints livepatch_cmdline
within 5 "[ \$(cat k/sys/module/livepatch_busy_fix/refcnt) = 0 ]"
run "klpfs rmmod livepatch_busy_fix"; prints ""

say "Once more, and forced this time: the next retry, at most a second later, completes it"
run "klpfs insmod livepatch_busy_fix.ko"; prints ""
run "cat $B/transition"; prints 1
run "echo 1 > $B/force"; prints ""
within 5 "[ \$(cat $B/transition) = 0 ]"
run "cat $B/enabled $B/transition"; prints $'1\n0'

say "Writing 0 returns at once, while a task still runs in the patched code: the directory is still there"
run "klpfs task add --comm reader --state D --stack livepatch_cmdline:livepatch_cmdline_proc_show"; ok
reader=$out
run "echo 0 > $P/enabled"; prints ""
run "cat $P/enabled $P/transition k/sys/module/livepatch_cmdline/refcnt"; prints $'0\n1\n1'

say "When the task has left it, the worker frees the patch: the directory vanishes, then the module's reference drops"
run "klpfs task wake $reader"; prints ""
within 5 "[ ! -e $P ]"
run "cat $P/enabled"; [ "$rc" != 0 ] || fail "the file is still there"; has "No such file or directory"
within 5 "[ \$(cat k/sys/module/livepatch_cmdline/refcnt) = 0 ]"
run "cat k/sys/module/livepatch_cmdline/refcnt"; prints 0
run "klpfs lsmod"; ok; has livepatch_cmdline
run "klpfs rmmod livepatch_cmdline"; prints ""
run "klpfs lsmod | cut -d' ' -f1"; prints $'Module\nlivepatch_busy_fix\nbusy'

say "The kernel log of all that"
run "klpfs dmesg"; ok
has "livepatch: 'livepatch_busy_fix': starting unpatching transition"
has "livepatch: forcing remaining tasks to the patched state"
has "livepatch: 'livepatch_cmdline': unpatching complete"

say "The end"
run "klpfs umount k"; prints ""
run "ls k"; prints ""
printf '\nThe demo went as it should.\n'
