# Runs in an instance: the file systems that two images of a VM lie on are full before the VM has
# written all. Its writes wait, nothing fails, other disks go on; and all is there when there is
# space again.
cat >work <<'S'
for disk in xvda xvdb xvdc; do until [ -b /dev/$disk ]; do sleep 0.1; done; done
written() {
    fio --thread --name="$1" --filename="/dev/$1" --rw=write --bs=64k --size=8M --offset_increment=8M --numjobs=2 \
        --cpus_allowed=0,1 --cpus_allowed_policy=split --iodepth=4 --ioengine=libaio --direct=1 --verify=crc32c \
        --verify_fatal=1 --verify_state_save=0 --group_reporting >"fio-$1" 2>&1 && return
    cat "fio-$1"
    echo "BAD: $*"
    exit 1
}
written xvda & a=$!
written xvdb & b=$!
while [ -e /proc/$a ] || [ -e /proc/$b ]; do
    head -c 65536 /dev/urandom >block
    dd if=block of=/dev/xvdc bs=64k conv=fsync 2>/dev/null || { echo BAD; exit 1; }
    n=$((n + 1))
    echo "TICK $n"
    sleep 0.2
done
wait $a || exit 1
wait $b || exit 1
for disk in xvda xvdb; do echo "SUM $disk $(md5sum <"/dev/$disk" | cut -d' ' -f1)"; done
S
lab-initrd work >work.img
mkdir raw qcow2
for place in raw qcow2; do mount -t tmpfs -o size=6M none $place || fail "no tmpfs"; done
blanket disk create --format raw --size 24M raw/disk.raw || fail "no raw image"
blanket disk create --size 24M qcow2/disk.qcow2 || fail "no qcow2 image"
blanket disk create --format raw --size 1M other.raw || fail "no raw image"
: >vm.log
blanket run --detach --name vm --kernel /guest/vmlinuz --initrd work.img --memory 768M --cpus 2 \
    --cmdline "quiet panic=-1" --console file:vm.log \
    --disk raw/disk.raw --disk qcow2/disk.qcow2 --disk other.raw >/dev/null || fail "no VM: $?"
state() { blanket disk list vm | awk -v disk="$1" '$1 == disk { print $3 }'; }
for disk in xvda xvdb; do
    until [ "$(state $disk)" = no-space ]; do
        blanket stats vm >/dev/null 2>&1 || fail "the VM is gone"
        ! grep -q BAD vm.log || fail "$disk: an error instead of a wait"
        sleep 0.2
    done
    echo "ok: $disk waits"
done
blanket disk list vm
df raw qcow2
# The third one goes on, and they wait on.
ticking vm 5
[ "$(state xvda) $(state xvdb) $(state xvdc)" = "no-space no-space connected" ] || fail "$(blanket disk list vm)"
log=$(find /run -name vm.log)
for disk in xvda xvdb; do grep -q "$disk: the host has no space" $log || fail "no word in the log: $(cat $log)"; done

for place in raw qcow2; do mount -o remount,size=64M $place || fail "no more space"; done
while blanket stats vm >/dev/null 2>&1; do
    blanket disk list vm >last.tmp 2>/dev/null && mv last.tmp last
    sleep 0.2
done
cat last $log
tr -d '\r' <vm.log | grep -qx 'GUEST-EXIT 0' || fail "it did not do it all"
for disk in xvda xvdb; do grep -q "$disk: no write waits" $log || fail "no word that $disk goes on"; done
sum=$(tr -d '\r' <vm.log | sed -n 's/^SUM xvda //p')
[ "$(md5sum <raw/disk.raw)" = "$sum  -" ] || fail "raw: other bytes"
blanket disk info qcow2/disk.qcow2 || fail "qcow2: not whole"
echo DISK-FULL-OK
