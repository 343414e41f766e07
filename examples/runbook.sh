#!/usr/bin/env bash
# A runbook for livepatches, as one for production: it uses kmod, dmesg and the kernel's files, and nothing of klpfs.
#
#   runbook.sh apply MODULE.ko [SECONDS]   insert it; take it back if it is not complete after SECONDS (default 60)
#   runbook.sh revert NAME [SECONDS]       disable it and remove the module
#
# Exits with 1 if the patch is not as asked afterwards.
set -euo pipefail
klp=/sys/kernel/livepatch

# within SECONDS CMD...: wait for a condition.
within() {
    local end=$((SECONDS + $1))
    shift
    until "$@" 2>/dev/null; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.05
    done
}
complete() { [ "$(cat $klp/$1/transition)" = 0 ]; }
gone() { [ ! -e $klp/$1 ]; }
unused() { [ "$(cat /sys/module/$1/refcnt)" = 0 ]; }

# Who keeps the transition from completing, and where.
blockers() {
    local task goal
    goal=$(cat $klp/$1/enabled)
    for task in /proc/[0-9]*/task/[0-9]*; do
        [ "$(cat $task/patch_state 2>/dev/null)" = $((1 - goal)) ] || continue
        echo "waits for ${task##*/} ($(cat $task/comm)):"
        sed 's/^\[<0>\]/   /' $task/stack
    done
}

apply() {
    local name
    name=$(modinfo -F name "$1")
    insmod "$1"
    if within "$2" complete "$name"; then
        echo "$name: enabled"
        return
    fi
    echo "$name: not complete after $2 s"
    blockers "$name"
    revert "$name" "$2"
    return 1
}

revert() {
    echo 0 >$klp/$1/enabled
    if ! within "$2" gone "$1"; then
        echo "$1: not disabled after $2 s"
        blockers "$1"
        return 1
    fi
    within "$2" unused "$1"
    rmmod "$1"
    echo "$1: removed"
}

case ${1:-} in
    apply | revert) "$1" "${2:?MODULE}" "${3:-60}" ;;
    *) sed -n '2,/^$/s/^# \?//p' "$0" >&2; exit 2 ;;
esac
