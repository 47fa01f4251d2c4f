# Runs in an instance: a VM writes to a raw file, to a block device past the instance's page
# cache, and to a qcow2 image on a backing file, by two queues each, and checks every block by
# its own sum (fio), while another disk comes and goes and two of the three grow. What it read in
# the end is what is in the images.
cat >work <<'S'
want() { until [ -b "/dev/$1" ]; do sleep 0.1; done; }
# number DISK: the kernel gives a disk one that no other has had. None if it is not there.
number() { cat "/sys/block/$1/diskseq" 2>/dev/null; }
# gone DISK NUMBER: when this looks, another one may have that name already.
gone() { while [ "$(number "$1")" = "$2" ]; do sleep 0.1; done; }
size() { until [ "$(blockdev --getsize64 "/dev/$1")" = "$2" ]; do sleep 0.1; done; }
# verified DISK HOW SIZE AT: 8 MiB from AT on, half of them by each CPU.
verified() {
    fio --thread --name="$1" --filename="/dev/$1" --rw="$2" --bs="$3" --offset="$4" --size=4M --offset_increment=4M \
        --numjobs=2 --cpus_allowed=0,1 --cpus_allowed_policy=split --iodepth=8 --ioengine=libaio --direct=1 \
        --verify=crc32c --verify_fatal=1 --verify_state_save=0 --group_reporting >"fio-$1" 2>&1 && return
    cat "fio-$1"
    echo "BAD: $*"
    exit 1
}
sum() { echo "SUM $1 $(md5sum <"/dev/$1" | cut -d' ' -f1)"; }
for disk in xvda xvdb xvdc; do want $disk; done
echo BEGIN
verified xvda randwrite 4k 0 & a=$!
verified xvdb randwrite 4k 0 & b=$!
verified xvdc randwrite 4k 0 & c=$!
for n in 1 2 3; do
    want xvdd
    number=$(number xvdd) || exit 1
    head -c 65536 /dev/urandom >block
    dd if=block of=/dev/xvdd bs=4k seek=16 conv=fsync 2>/dev/null || exit 1
    # A part of a block.
    dd if=block of=/dev/xvdd bs=512 count=1 seek=35 conv=fsync 2>/dev/null || exit 1
    blockdev --flushbufs /dev/xvdd
    dd if=/dev/xvdd bs=512 skip=35 count=1 2>/dev/null | cmp -n 512 - block || exit 1
    dd if=/dev/xvdd bs=4k skip=16 count=16 2>/dev/null | cmp - block || exit 1
    echo "USED $n"
    gone xvdd "$number"
done
wait $a || exit 1
wait $b || exit 1
wait $c || exit 1
# What was not there at first; sequences.
size xvda 41943040
size xvdc 41943040
verified xvda write 128k 32M & a=$!
verified xvdc write 128k 32M & c=$!
verified xvdb write 128k 8M
verified xvdb randrw 16k 16M
wait $a || exit 1
wait $c || exit 1
for disk in xvda xvdb xvdc; do sum $disk; done
number=$(number xvdc) || exit 1
echo "UNDER $(dd if=/dev/xvdc bs=1M skip=24 count=8 2>/dev/null | md5sum | cut -d' ' -f1)"
gone xvdc "$number"
want xvdc
echo AGAIN
sum xvdc
S
lab-initrd work >work.img
# line TEXT: waits for a line of the VM's. A little before the case's time is over it says for which.
line() {
    until tr -d '\r' <vm.log | grep -qx "$1"; do
        [ "$(cut -d. -f1 /proc/uptime)" -lt 560 ] || { blanket disk list vm; fail "no $1"; }
        blanket stats vm >/dev/null 2>&1 || fail "the VM is gone before $1"
        ! grep -q BAD vm.log || fail "before $1"
        sleep 0.2
    done
}
sum() { tr -d '\r' <vm.log | sed -n "s/^SUM $1 //p" | tail -n 1; }
cache() { blanket disk list vm | awk -v disk="$1" '$1 == disk { print $4 }'; }

blanket disk create --format raw --size 32M file.raw || fail "no raw image"
head -c 33554432 /dev/urandom >base.raw
blanket disk create --backing base.raw over.qcow2 || fail "no overlay"
blanket disk create --format raw --size 4M more.raw || fail "no raw image"
truncate -s 32M device.raw && losetup /dev/loop0 device.raw || fail "no loop device"
# Blocks of 4096 bytes.
echo 4M >/sys/block/zram0/disksize || fail "no zram"

: >vm.log
blanket run --detach --name vm --kernel /guest/vmlinuz --initrd work.img --memory 768M --cpus 2 \
    --cmdline "quiet panic=-1" --console file:vm.log --attach-from "$PWD" --attach-from /dev \
    --disk file.raw --disk /dev/loop0 --disk over.qcow2 >/dev/null || fail "no VM: $?"
line BEGIN
[ "$(cache xvda) $(cache xvdb) $(cache xvdc)" = "writeback none writeback" ] || fail "other caches: $(blanket disk list vm)"
blanket disk resize vm xvda --size 40M || fail "the raw image does not grow"
blanket disk resize vm xvdc --size 40M || fail "the qcow2 image does not grow"
! blanket disk resize vm xvdb --size 40M 2>said || fail "a block device grows"
for n in 1 2 3; do
    disk=more.raw cached=writeback
    [ $n != 3 ] || disk=/dev/zram0
    [ "$(blanket disk attach vm $disk)" = xvdd ] || fail "$disk is not attached as xvdd"
    [ "$(cache xvdd)" = $cached ] || fail "another cache: $(blanket disk list vm)"
    line "USED $n"
    blanket disk detach vm xvdd --timeout 120 || fail "$disk is not detached"
    echo "ok: $disk came and went"
done
line 'UNDER .*'
before=$(sum xvdc)
blanket disk list vm
[ "$(blanket disk list vm | awk 'NR > 1 { n += $8 } END { print n }')" = 0 ] || fail "there were errors"
blanket disk detach vm xvdc --timeout 120 || fail "xvdc is not detached"
blanket disk info over.qcow2 || fail "over.qcow2"
[ "$(blanket disk attach vm over.qcow2)" = xvdc ] || fail "not as xvdc"
line AGAIN
while blanket stats vm >/dev/null 2>&1; do sleep 0.2; done
tr -d '\r' <vm.log | grep -qx 'GUEST-EXIT 0' || fail "it did not do it all"
[ "$(sum xvdc)" = "$before" ] || fail "over.qcow2 is another one after it was closed"
under=$(tr -d '\r' <vm.log | sed -n 's/^UNDER //p')
[ "$(dd if=base.raw bs=1M skip=24 2>/dev/null | md5sum)" = "$under  -" ] || fail "the image below is not seen"
for pair in xvda=file.raw xvdb=/dev/loop0 xvdb=device.raw; do
    [ "$(md5sum <"${pair#*=}")" = "$(sum "${pair%=*}")  -" ] || fail "$pair: other bytes"
    echo "ok: $pair"
done
[ "$(wc -c <file.raw)" = 41943040 ] || fail "the raw image has another size"
echo DISKS-OK
