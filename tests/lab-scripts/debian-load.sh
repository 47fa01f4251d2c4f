# A whole Debian under load: verified I/O while disks come, grow and go; streams over its
# network, both ways.
boot /dev/vdb
running
blanket disk create --format raw --size 64M one.raw || fail "no image"
blanket disk create --size 64M two.qcow2 || fail "no image"
for image in one.raw two.qcow2; do blanket disk attach deb $image >/dev/null || fail "$image"; done
in_vm 'until [ -b /dev/xvdc ] && [ -b /dev/xvdd ]; do sleep 0.2; done'

# verified DISK HOW SIZE: fio writes, and checks each block by its own sum.
verified() {
    in_vm sudo fio --name="$1" --filename="/dev/$1" --rw="$2" --bs="$3" --size=24M --numjobs=2 --offset_increment=24M \
        --iodepth=16 --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 --verify_state_save=0 \
        --group_reporting "--output=/tmp/fio-$1.txt" ||
        { in_vm sudo cat "/tmp/fio-$1.txt"; fail "fio: $*"; }
}
verified xvdc randwrite 4k &
one=$!
verified xvdd write 128k &
two=$!
# Meanwhile another one comes and goes, and both grow.
blanket disk create --format raw --size 16M three.raw || fail "no image"
for n in 1 2 3; do
    name=$(blanket disk attach deb three.raw) || fail "three.raw does not come"
    in_vm "until [ -b /dev/$name ]; do sleep 0.2; done; sudo dd if=/dev/urandom of=/dev/$name bs=64k count=16 iflag=fullblock oflag=direct 2>/dev/null" ||
        fail "three.raw does not work"
    blanket disk detach deb "$name" --timeout 120 || fail "three.raw does not go"
done
blanket disk resize deb xvdc --size 80M || fail "no resize of a raw disk"
blanket disk resize deb xvdd --size 80M || fail "no resize of a qcow2 disk"
wait $one || fail "xvdc: a bad block"
wait $two || fail "xvdd: a bad block"
for workload in "xvdc randrw 16k" "xvdd randwrite 4k"; do
    # shellcheck disable=SC2086
    verified $workload
done
echo "ok: fio found no bad block"

iperf3 -s -D || fail "no iperf3"
for to in 192.168.77.1 fd77::1; do
    for how in "" "-R" "-u -b 20M -l 1200" "-u -b 5M -l 64 -R" "-M 536"; do
        in_vm iperf3 -c $to -t 2 -i 0 $how >iperf.log 2>&1 || { cat iperf.log; fail "iperf3 to $to $how"; }
        echo "ok: iperf3 to $to $how: $(grep -E 'receiver' iperf.log | tail -n 1)"
    done
done
# What arrives is what was sent: 32 MiB each way.
dd if=/dev/urandom of=data bs=1M count=32 2>/dev/null
sum=$(md5sum <data)
[ "$(in_vm 'tee data | md5sum' <data)" = "$sum" ] || fail "other bytes arrive in the VM"
[ "$(in_vm cat data | md5sum)" = "$sum" ] || fail "other bytes come back"

# A reboot, asked for inside.
in_vm sudo systemctl reboot || true
until blanket ps --json | grep -q '"boots": 2'; do
    blanket stats deb >/dev/null || fail "deb is gone"
    sleep 1
done
login
running
# And one from outside.
blanket reboot deb --timeout 600 || fail "it does not reboot"
until blanket ps --json | grep -q '"boots": 3'; do
    blanket stats deb >/dev/null 2>&1 || fail "deb is gone"
    sleep 1
done
login
running
# It powers itself off when it is asked to inside, as `debian` does when it is asked to from outside.
in_vm sudo systemctl poweroff || true
until ! blanket stats deb >/dev/null 2>&1; do sleep 1; done
tail -n 40 deb.log | tr -d '\r' | grep -qE 'System halted|Power down' || fail "it did not power itself off"
for image in one.raw two.qcow2; do blanket disk info $image || fail "$image"; done
echo DEBIAN-OK
