# Stands in for the functions.sh of the kernel's selftests: what a script would do is written to file descriptor 9 as
# steps, one a line, with NUL-free words separated by \x1f (newlines in them as \x1e), and nothing is done.
function step() { local IFS=$'\x1f'; local line="$*"; printf '%s\n' "${line//$'\n'/$'\x1e'}" >&9; }
function setup_config() { step setup_config; }
function start_test() { step start_test "$1"; }
function check_result() { step check_result "$*"; }
function log() { step log "$1"; }
function skip() { step skip "$1"; }
function die() { :; } # conditions see no machine: they are checked by the real run
function loop_until() { # its condition is evaluated by functions.sh: with the script's constants put in here
    local condition=$*
    while [[ $condition =~ \$(MOD_[A-Z0-9_]+) ]]; do
        condition=${condition/"${BASH_REMATCH[0]}"/${!BASH_REMATCH[1]}}
    done
    step loop_until "$condition"
}
function cat() { echo; }
function grep() { step grep "$@"; }
function set_ftrace_enabled() { step set_ftrace_enabled "$@"; }
function set_pre_patch_ret() { step set_pre_patch_ret "$@"; }
function load_mod() { step load_mod "$@"; }
function load_lp() { step load_lp "$@"; }
function load_lp_nowait() { step load_lp_nowait "$@"; }
function load_failing_mod() { step load_failing_mod "$@"; }
function unload_mod() { step unload_mod "$@"; }
function unload_lp() { step unload_mod "$@"; }
function disable_lp() { step disable_lp "$@"; }
function check_sysfs_rights() { step check_sysfs_rights "$@"; }
function check_sysfs_value() { step check_sysfs_value "$@"; }
