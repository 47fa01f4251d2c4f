# Runs in an instance: a VM of 256 MiB gives half of its memory to the host and gets it
# back, while it takes digests of what it holds. What the host has given to the VM is
# what its memory cgroup says.
cat >hold <<'S'
mkdir /hold && mount -t tmpfs -o size=90% none /hold || exit 1
dd if=/dev/urandom of=/hold/keep bs=1M count=16 2>/dev/null
kept=$(md5sum </hold/keep)
total() { awk '$1 == "MemTotal:" { print int($2 / 1024) }' /proc/meminfo; }
n=0
while :; do
    # With all of its memory, it uses much of that once.
    if [ "$(total)" -lt 200 ]; then
        filled=
    elif [ -z "$filled" ]; then
        dd if=/dev/zero of=/hold/much bs=1M count=110 2>/dev/null || { echo BAD much; exit 1; }
        rm /hold/much
        filled=yes
    fi
    sum=$(yes "$n" | head -c 6000000 | tee /hold/big | md5sum)
    [ "$(md5sum </hold/big)" = "$sum" ] || { echo BAD big; exit 1; }
    [ "$(md5sum </hold/keep)" = "$kept" ] || { echo BAD keep; exit 1; }
    rm /hold/big
    n=$((n + 1))
    echo "TOTAL $(total)"
    echo "TICK $n"
done
S
lab-initrd hold >hold.img
mkdir -p /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup || fail "no cgroups"
echo +memory >/sys/fs/cgroup/cgroup.subtree_control
mkdir /sys/fs/cgroup/vm || fail "no memory cgroup"
# MiB of memory files that the host has given to the VM.
given() { awk '$1 == "shmem" { print int($2 / 1048576) }' /sys/fs/cgroup/vm/memory.stat; }
gauge() { blanket stats vm --format prometheus | awk -v m="blanket_$1{" 'index($1, m) == 1 { print $2 / 1048576 }'; }
total() { tr -d '\r' <vm.log | sed -n 's/^TOTAL //p' | tail -n 1; }

: >vm.log
sh -c 'echo 0 >/sys/fs/cgroup/vm/cgroup.procs && exec "$@"' sh blanket run --detach --name vm \
    --kernel /guest/vmlinuz --initrd hold.img --memory 256M --cpus 2 --cmdline "quiet panic=-1" \
    --console file:vm.log >/dev/null || fail "it does not start: $?"
! blanket balloon vm 512M 2>said || fail "more than it has"
grep -q 'can have 256 MiB of memory at most, and not 512 MiB' said || fail "$(cat said)"
! blanket balloon vm 1M 2>said || fail "too little"
ticking vm 1
full=$(given) before=$(total)
[ "$full" -ge 150 ] || fail "it uses only $full MiB"
[ "$(gauge memory_current_bytes)" = 256 ] || fail "it has not all: $(gauge memory_current_bytes)"

blanket balloon vm 128M --timeout 120 >said || fail "down: $(cat said; blanket stats vm)"
grep -qx 'vm has 128 of 256 MiB' said || fail "$(cat said)"
less=$(given)
echo "256 MiB: the host gave $full; 128 MiB: $less"
[ "$less" -le 129 ] || fail "the host gives $less MiB"
[ $((full - less)) -ge 40 ] || fail "the host has got too little back"
[ "$(gauge memory_target_bytes) $(gauge memory_current_bytes)" = "128 128" ] || fail "stats do not say so"
blanket ps | grep -q '128M/256M' || fail "ps does not say so: $(blanket ps)"
blanket audit vm >said || fail "$(cat said)"
ticking vm 2
[ "$(total)" = $((before - 128)) ] || fail "the guest has $(total) MiB, and had $before"
most=$(given)
[ "$most" -le 129 ] || fail "the host gives $most MiB to a guest of 128"

blanket balloon vm 256M --timeout 120 --json >said || fail "up: $(cat said)"
grep -q '"current_bytes": 268435456' said || fail "$(cat said)"
ticking vm 2
[ "$(total)" = "$before" ] || fail "the guest has $(total) MiB again, and had $before"
again=$(given)
echo "256 MiB again: $again"
[ "$again" -gt 135 ] || fail "the guest does not use what it has got back"

# To and fro while it works, and no waiting: the guest ends where it was last sent to.
for size in 200M 140M 180M 120M 160M; do
    blanket balloon vm $size --timeout 0.3 >/dev/null 2>&1
done
blanket balloon vm 160M --timeout 120 || fail "to and fro: $(blanket stats vm)"
blanket audit vm || fail "the audit: $?"
ticking vm 1
[ "$(given)" -le 161 ] || fail "the host gives $(given) MiB"
tr -d '\r' <vm.log | grep TOTAL | uniq -c
blanket kill vm || fail "kill: $?"
! grep -q BAD vm.log || fail "it has worked wrong"
echo "BALLOON-OK"
