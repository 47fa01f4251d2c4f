# Runs in a VM: processes, memory, time and CPUs work. Exits with 0 if so.
fail() { echo "FAILED: $*"; exit 1; }

grep -q hypervisor /proc/cpuinfo || fail "not a VM"
[ "$(cat /sys/hypervisor/type)" = xen ] || fail "no Xen ABI"
[ "$(cat /sys/hypervisor/guest_type)" = PV ] || fail "not a PV guest"

# Every vCPU takes part.
for cpu in $(sed -n 's/^processor[^0-9]*//p' /proc/cpuinfo); do
    taskset $((1 << cpu)) true || fail "cannot run on CPU $cpu"
done
[ "$(nproc)" = "$(getconf _NPROCESSORS_ONLN 2>/dev/null || grep -c ^processor /proc/cpuinfo)" ] ||
    fail "CPUs missing"

# Fork and exec.
n=0
while [ $n -lt 100 ]; do /bin/true || fail "exec $n"; n=$((n + 1)); done
[ "$(seq 1 500 | sort -n | tail -n 1)" = 500 ] || fail "pipes"

# Memory keeps what is written to it, on all CPUs at once. Five files that take a
# third of what is free.
mib=$(awk '/^MemAvailable/ { m = int($2 / 1024 / 15); print (m < 1 ? 1 : (m > 16 ? 16 : m)) }' /proc/meminfo)
dd if=/dev/urandom of=/tmp/data bs=1M count=$mib 2>/dev/null || fail "no file of $mib MiB"
sum=$(md5sum </tmp/data)
for copy in 1 2 3 4; do cp /tmp/data /tmp/data$copy & done
wait
for copy in 1 2 3 4; do
    [ "$(md5sum </tmp/data$copy)" = "$sum" ] || fail "copy $copy differs"
done
rm /tmp/data*

# A sleep lasts as long as it says.
read -r before _ </proc/uptime
sleep 0.5
read -r after _ </proc/uptime
slept=$(echo "$after $before" | awk '{ printf "%d", ($1 - $2) * 100 }')
[ "$slept" -ge 49 ] && [ "$slept" -lt 200 ] || fail "slept ${slept}0 ms instead of 500"

if dmesg | grep -E 'WARNING: CPU|BUG: |Oops|Call Trace:|INFO: task'; then fail "the kernel complains"; fi
echo "BASICS-OK $(uname -r) $(nproc) CPUs"
