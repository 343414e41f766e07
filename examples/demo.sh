#!/usr/bin/env bash
# The life of livepatches on a klpfs mount, shown with plain cat, echo and ls. Prints each command and what it answers,
# checks what it shows, and exits with 1 if anything is not as it should be. Run it by: make demo
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
export XDG_RUNTIME_DIR=$work/run M=$work/mnt
mkdir -m 700 "$XDG_RUNTIME_DIR" && mkdir "$M"
cleanup() { klpfs umount "$M" >/dev/null 2>&1 || umount -l "$M" 2>/dev/null || true; rm -rf "$work"; }
trap cleanup EXIT
trap 'exit 130' INT TERM
failed=0

if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then bold=$'\e[1m' dim=$'\e[2m' plain=$'\e[0m'; else bold='' dim='' plain=''; fi
title() { printf '\n%s# %s%s\n' "$dim" "$*" "$plain"; }
# show COMMAND: print it, run it here, print its output; a failing command shows its status and goes on.
show() {
    local rc=0
    printf '%s$ %s%s\n' "$bold" "$1" "$plain"
    eval "$1" 2>&1 | sed -E "s#^$0: line [0-9]+: ##" || rc=$?
    [ $rc = 0 ] || echo "(exit status $rc)"
}
# expect WHAT COMMAND: the command must succeed; otherwise the demo has failed.
expect() { eval "$2" >/dev/null 2>&1 || { echo "DEMO FAILED: $1" >&2; failed=1; }; }
# until_true WHAT COMMAND: wait up to 20 seconds.
until_true() { local i; for i in $(seq 400); do eval "$2" >/dev/null 2>&1 && return 0; sleep .05; done; echo "DEMO FAILED: waited in vain: $1" >&2; failed=1; }

cd "$work"
for spec in cmdline busy busy_fix; do klpfs mkmod "$here/modules/$spec.toml" -o "$spec.ko"; done

title 'An emulated kernel, mounted at $M. Its module files were made by klpfs mkmod, without a compiler.'
show 'klpfs mount $M; ls $M $M/sys/kernel'
show 'modinfo -F description -F livepatch cmdline.ko; file -b cmdline.ko'

title 'One insmod enables a patch: its directory is there, and /proc/cmdline is printed by the new function.'
cd "$M/sys/kernel/livepatch"
show 'klpfs insmod $OLDPWD/cmdline.ko'
until_true 'the transition' '[ "$(cat livepatch_cmdline/transition)" = 0 ]'
show 'ls -R livepatch_cmdline'
show 'cat livepatch_cmdline/enabled livepatch_cmdline/transition'
show 'cat $M/proc/cmdline'
expect 'the patched function prints' 'grep -q "live patched" $M/proc/cmdline'
show 'klpfs rmmod livepatch_cmdline'
show 'echo 1 > livepatch_cmdline/enabled'

title 'A second patch stalls: a kernel thread sleeps inside the function that it replaces.'
show 'klpfs insmod $OLDPWD/busy.ko block_transition=Y'
show 'klpfs insmod $OLDPWD/busy_fix.ko'
show 'cat livepatch_busy_fix/enabled livepatch_busy_fix/transition'
expect 'the patch is in transition' '[ "$(cat livepatch_busy_fix/transition)" = 1 ]'
show 'klpfs status'
show '(cd $M/proc; cat $(dirname $(grep -lx 0 [0-9]*/patch_state))/{comm,stack})'
show 'echo 0 > livepatch_cmdline/enabled'

title 'Reversed by writing 0: the transition turns around, and then the patch is gone with its directory.'
show 'echo 0 > livepatch_busy_fix/enabled; cat livepatch_busy_fix/enabled livepatch_busy_fix/transition'
until_true 'removal after the reversal' '[ ! -e livepatch_busy_fix ]'
show 'ls'
until_true 'the last reference' '[ "$(cat $M/sys/module/livepatch_busy_fix/refcnt)" = 0 ]'
show 'klpfs rmmod livepatch_busy_fix'

title 'Loaded again, and forced this time: the next retry completes it.'
show 'klpfs insmod $OLDPWD/busy_fix.ko; cat livepatch_busy_fix/transition; echo 1 > livepatch_busy_fix/force'
until_true 'the forced transition' '[ "$(cat livepatch_busy_fix/transition)" = 0 ]'
show 'cat livepatch_busy_fix/enabled livepatch_busy_fix/transition'

title 'Disabled by writing 0: the write returns, the worker removes the directory, and only then the module is free.'
show 'cat $M/sys/module/livepatch_cmdline/refcnt; echo 0 > livepatch_cmdline/enabled'
until_true 'removal of the directory' '[ ! -e livepatch_cmdline ]'
until_true 'the last reference' '[ "$(cat $M/sys/module/livepatch_cmdline/refcnt)" = 0 ]'
show 'ls; cat livepatch_cmdline/enabled'
show 'cat $M/sys/module/livepatch_cmdline/refcnt; klpfs rmmod livepatch_cmdline; klpfs lsmod'
expect 'the module is gone' '[ ! -e $M/sys/module/livepatch_cmdline ]'

title 'What the kernel log says of all that.'
show 'klpfs dmesg --notime | grep -e livepatch: -e busy'
expect 'the log has the story' 'klpfs dmesg --notime | grep -qF "livepatch: forcing remaining tasks to the patched state"'
cd "$work"
show 'klpfs umount $M'
expect 'nothing is mounted any more' '! mountpoint -q $M'
[ $failed = 0 ] && printf '\nThe demo went as it should.\n' || exit 1
