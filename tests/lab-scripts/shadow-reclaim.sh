# Runs in an instance: the shadow pool of a VM that had many processes gives memory back
# when the instance is short of it, and the VM works on, with many processes again.
cat >storms <<'S'
storm=0 n=0
while :; do
    i=0 jobs=
    while [ $i -lt 60 ]; do
        sleep 1000 &
        jobs="$jobs $!"
        i=$((i + 1))
    done
    storm=$((storm + 1))
    echo "STORM $storm"
    kill $jobs
    wait
    echo "OVER $storm"
    i=0
    while [ $i -lt 8 ]; do
        sum=$(dd if=/dev/zero bs=64k count=16 2>/dev/null | md5sum)
        [ "${sum%% *}" = b6d81b360a5672d80c27430f39153e2c ] || { echo BAD; exit 1; }
        i=$((i + 1)) n=$((n + 1))
        echo "TICK $n"
    done
done
S
lab-initrd storms >storms.img
mkdir -p /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup || fail "no cgroups"
echo +memory >/sys/fs/cgroup/cgroup.subtree_control
mkdir /sys/fs/cgroup/tight || fail "no memory cgroup"
pages() { blanket stats vm --format prometheus | awk '/^blanket_shadow_pages/ { print $2 }'; }
last() { tr -d '\r' <vm.log | sed -n "s/^$1 //p" | tail -n 1; }
# over N: waits until so many storms are over.
over() {
    until [ "$(last OVER)" -ge "$1" ] 2>/dev/null; do
        blanket stats vm >/dev/null 2>&1 || fail "the VM is gone"
        ! grep -q BAD vm.log || fail "it has worked wrong"
        sleep 0.2
    done
}

: >vm.log
blanket run --detach --name vm --kernel /guest/vmlinuz --initrd storms.img --memory 128M --cpus 2 \
    --cmdline "quiet panic=-1" --console file:vm.log >/dev/null || fail "it does not start: $?"
over 2
grown=$(pages)

# Somebody who reads more than there is room for: the instance waits for memory.
echo 6M >/sys/fs/cgroup/tight/memory.max
sh -c 'echo 0 >/sys/fs/cgroup/tight/cgroup.procs; while :; do cat /dev/vda >/dev/null; done' &
tight=$!
least=$grown tries=0
while [ $((least * 4)) -gt $((grown * 3)) ]; do
    now=$(pages)
    [ "${now:-$least}" -ge "$least" ] || least=$now
    tries=$((tries + 1))
    [ $tries -lt 400 ] || fail "the pool has $least of $grown pages; $(cat /proc/pressure/memory)"
    sleep 0.2
done
kill $tight
echo "shadow pages: $grown after the storms, $least when memory was short"
storms=$(last STORM)
over $((storms + 2))
blanket audit vm >said || fail "$(cat said)"
echo "$(pages) after two more storms"
blanket stats vm | grep -E " (trim|fill) "
blanket kill vm || fail "kill: $?"
echo "RECLAIM-OK"
