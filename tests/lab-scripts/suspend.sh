# Runs in an instance whose kernel can test suspending (CONFIG_PM_DEBUG): everything up
# to the last step of suspend to idle, and of suspend to RAM, while VMs work, and back.
start one --cpus 2
start two
ticking one
ticking two
echo 1 >/sys/module/suspend/parameters/pm_test_delay
for test in freeze/freezer freeze/devices freeze/platform mem/processors mem/core; do
    before=$(cat /sys/power/suspend_stats/fail)
    grep -q "${test#*/}" /sys/power/pm_test || fail "the kernel has no test ${test#*/}"
    echo "${test#*/}" >/sys/power/pm_test
    echo "${test%/*}" >/sys/power/state || fail "$test: $?"
    [ "$(cat /sys/power/suspend_stats/fail)" = "$before" ] || fail "$test: $(tail -n 1 /sys/power/suspend_stats/last_failed_step)"
    ticking one
    ticking two
    echo "ok: $test, ticks $(ticks one) and $(ticks two)"
done
blanket kill one && blanket kill two || fail "kill: $?"
echo "SUSPEND-OK"
