#!/usr/bin/env bash
# Rehearse the runbook: with a task that sleeps in the function to be patched, and without. For: klpfs run -- rehearsal.sh
# Needs busy.ko and livepatch_busy_fix.ko in the current directory.
set -eu
runbook=$(dirname "$0")/runbook.sh

insmod busy.ko block_transition=Y
"$runbook" apply livepatch_busy_fix.ko 2 || echo "exit status $?"

echo N >/sys/module/busy/parameters/block_transition
"$runbook" apply livepatch_busy_fix.ko
"$runbook" revert livepatch_busy_fix
dmesg --notime | grep ^livepatch:
