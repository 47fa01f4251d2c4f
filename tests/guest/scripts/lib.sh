# Common to the scripts here; sourced by them. Runs in busybox's shell.
#
# A script is a row of `check NAME COMMAND...` lines and ends with `summary`.
# Each check prints PASS or FAIL; the exit code of the script is 0 when none
# failed. N is a factor for the amount of work, in percent (default 100).

N=${N:-100}
PASSED=0
FAILED=0
WORK=${WORK:-/tmp/stress.$$}
mkdir -p "$WORK"

# count FULL: FULL scaled by N, at least 1
count() {
    c=$(($1 * N / 100))
    [ $c -gt 0 ] || c=1
    echo $c
}

# check NAME COMMAND...: the command runs in a subshell, in the work directory
check() {
    name=$1
    shift
    if (cd "$WORK" && "$@") >"$WORK/log" 2>&1; then
        PASSED=$((PASSED + 1))
        echo "PASS $name"
    else
        FAILED=$((FAILED + 1))
        echo "FAIL $name: $(tail -n 3 "$WORK/log" | tr '\n' ';')"
    fi
    rm -f "$WORK/log"
}

# fail MESSAGE...: for use inside checks
fail() {
    echo "$*"
    exit 1
}

# digest WANTED COMMAND...: the command's output must have this sha256sum
digest() {
    wanted=$1
    shift
    got=$("$@" | sha256sum)
    [ "${got%% *}" = "$wanted" ] || fail "$*: $got"
}

# kernel_is_quiet: no warning, oops or hang in the kernel's log
kernel_is_quiet() {
    if dmesg | grep -E 'WARNING: CPU|BUG: |Oops|Call Trace:|INFO: task|segfault at|general protection'; then
        exit 1
    fi
}

summary() {
    check kernel_is_quiet kernel_is_quiet
    rm -rf "$WORK"
    echo "STRESS $PASSED passed, $FAILED failed"
    [ $FAILED -eq 0 ]
}
