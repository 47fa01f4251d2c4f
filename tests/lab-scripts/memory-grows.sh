# Runs in an instance: a VM starts with 256 MiB and may have 512. It gets them while it
# runs, holds more in them than it had at first, and gives them back; the instance's
# memory goes and comes with that. What the instance has given to the VM is what its
# memory cgroup says. Giving up is the slow part.
cat >grow <<'S'
total() { awk '$1 == "MemTotal:" { print int($2 / 1024) }' /proc/meminfo; }
# The root's own file system may have half of what there was at the start.
mount -t tmpfs -o size=420m none /tmp || exit 1
n=0
while :; do
    now=$(total)
    if [ "$now" -gt 400 ] && [ -z "$used" ]; then
        MIB=30 ROUNDS=1 sh /tests/checksums.sh || { echo BAD; exit 1; }
        used=yes
    fi
    n=$((n + 1))
    echo "TOTAL $now"
    echo "TICK $n"
    sleep 0.2
done
S
lab-initrd grow >grow.img
mkdir -p /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup || fail "no cgroups"
echo +memory >/sys/fs/cgroup/cgroup.subtree_control
mkdir /sys/fs/cgroup/vm || fail "no memory cgroup"
# MiB of memory files that the instance has given to the VM, and the most that it had.
given() { awk '$1 == "shmem" { print int($2 / 1048576) }' /sys/fs/cgroup/vm/memory.stat; }
total() { tr -d '\r' <vm.log | sed -n 's/^TOTAL //p' | tail -n 1; }
gauge() { blanket stats vm --format prometheus | awk -v m="blanket_$1{" 'index($1, m) == 1 { print $2 / 1048576 }'; }
run() {
    sh -c 'echo 0 >/sys/fs/cgroup/vm/cgroup.procs && exec "$@"' sh blanket run --name vm \
        --kernel /guest/vmlinuz --initrd grow.img --cpus 2 --cmdline "quiet panic=-1" "$@"
}

: >vm.log
! run --memory 256M --max-memory 128M 2>said </dev/null || fail "less than it starts with"
grep -q 'starts with 256 MiB of memory .*more than the 128 MiB' said || fail "$(cat said)"
! run --memory 256M --max-memory 65G 2>said </dev/null || fail "more than there can be"
grep -q '66560 MiB of memory are too much: a VM has at most 655' said || fail "$(cat said)"
grep -q 'at most 11 times' said || fail "no word of what Linux takes: $(cat said)"

run --memory 256M --max-memory 512M --detach --console file:vm.log >/dev/null || fail "it does not start: $?"
ticking vm 1
before=$(total) first=$(given)
[ "$(gauge memory_current_bytes) $(gauge memory_max_bytes)" = "256 512" ] || fail "stats do not say so"
blanket ps | grep -q '256M/512M' || fail "ps does not say so: $(blanket ps)"
blanket ps --json | grep -q '"generation_id": "[0-9]*:[0-9]*"' || fail "no generation id: $(blanket ps --json)"
[ "$first" -le 257 ] || fail "the instance gives $first MiB to a guest of 256"
! blanket balloon vm 513M 2>said || fail "more than it can have"
grep -q 'start it with a larger --max-memory' said || fail "$(cat said)"

# What it has and does not use costs nothing yet.
blanket balloon vm 384M --timeout 60 >said || fail "up: $(cat said; blanket stats vm)"
grep -qx 'vm has 384 of 512 MiB' said || fail "$(cat said)"
ticking vm 2
[ "$(total)" = $((before + 128)) ] || fail "the guest has $(total) MiB, and had $before"
some=$(given)
[ $((some - first)) -le 40 ] || fail "the instance has given $((some - first)) MiB that nobody used"
blanket audit vm >said || fail "$(cat said)"

blanket balloon vm 512M --timeout 60 || fail "up: $(blanket stats vm)"
ticking vm 2
[ "$(total)" = $((before + 256)) ] || fail "the guest has $(total) MiB, and had $before"
grep -q 'STRESS 3 passed, 0 failed' vm.log || fail "it has not used what it got"
most=$(given)
[ "$most" -ge 265 ] || fail "it used $most MiB only"
blanket audit vm >said || fail "$(cat said)"

blanket balloon vm 256M --timeout 180 || fail "down: $(blanket stats vm)"
less=$(given)
[ "$less" -le 257 ] || fail "the instance gives $less MiB to a guest of 256"
ticking vm 2
[ "$(total)" = "$before" ] || fail "the guest has $(total) MiB, and had $before"
blanket audit vm >said || fail "$(cat said)"
blanket kill vm || fail "kill: $?"
! grep -q BAD vm.log || fail "it has worked wrong"
echo "MemTotal $before of 256 MiB; the instance gave $first, of 384 unused $some, of 512 used $most, of 256 again $less MiB"
echo "GROWS-OK"
