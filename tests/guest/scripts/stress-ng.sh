#!/bin/sh
# Debian's stress-ng: the stressors that a guest kernel and the hypervisor
# below it feel, each bounded by operations, checking its own results.
#
#   stress-ng.sh [STRESSOR...]      default: all of those below
#
# TIMEOUT is the limit for one stressor in seconds (default 300); one that
# reaches it before its operations are done counts as failed. WORKERS is the
# number of processes of each (default: one per CPU). How to put stress-ng into
# an initramfs is told in README.md.
. "${0%/*}/lib.sh"

TIMEOUT=${TIMEOUT:-300}
WORKERS=${WORKERS:-$(nproc)}

# run NAME OPERATIONS [OPTION...]
run() {
    stressor=$1
    ops=$(count "$2")
    shift 2
    read -r begun _ </proc/uptime
    stress-ng --"$stressor" "$WORKERS" --"$stressor"-ops "$ops" --timeout "$TIMEOUT" \
        --verify --oomable --temp-path "$WORK" --metrics-brief "$@" >out 2>&1 ||
        fail "exit code $?: $(grep -E 'fail|error' out | head -n 3)"
    read -r ended _ </proc/uptime
    if grep -E 'stress-ng: (fail|error)' out; then exit 1; fi
    took=$(echo "$ended $begun" | awk '{ printf "%d", $1 - $2 }')
    [ "$took" -lt "$TIMEOUT" ] || fail "$ops operations not done in $TIMEOUT s"
    rm -f out
}

do_cpu() { run cpu 100 --cpu-method int64; run cpu 40 --cpu-method fft; run cpu 40 --cpu-method matrixprod; }
do_vm() { run vm 20000 --vm-bytes 16m --vm-method flip; run vm 20000 --vm-bytes 16m --vm-keep --vm-method incdec; }
do_fork() { run fork 1000; }
do_vfork() { run vfork 2000; }
do_clone() { run clone 200; }
do_futex() { run futex 5000; }
do_pipe() { run pipe 20000; }
do_signal() { run signal 20000; }
do_sigsegv() { run sigsegv 5000; }
do_mmap() { run mmap 40 --mmap-bytes 8m; }
do_mremap() { run mremap 400 --mremap-bytes 4m; }
do_switch() { run switch 20000; }
do_timer() { run timer 5000 --timer-freq 2000; }
do_timerfd() { run timerfd 500 --timerfd-freq 500; }
do_pthread() { run pthread 500; }
do_mprotect() { run mprotect 5000; }
do_madvise() { run madvise 20; }
do_stack() { run stack 2; }
do_brk() { run brk 20000; }
do_fault() { run fault 2000; }
do_eventfd() { run eventfd 10000; }
do_poll() { run poll 5000; }
do_sleep() { run sleep 500; }
do_getrandom() { run getrandom 1000; }
do_seek() { run seek 2000 --seek-size 1m; }
do_bad_altstack() { run bad-altstack 200; }

DEFAULT="cpu vm fork futex pipe signal mmap switch timer"
MORE="vfork clone sigsegv mremap timerfd pthread mprotect madvise stack brk fault eventfd poll
sleep getrandom seek bad_altstack"

[ "$1" = all ] && set -- $DEFAULT $MORE
for name in ${*:-$DEFAULT}; do
    check "stress_ng_$name" "do_$name"
done
summary
