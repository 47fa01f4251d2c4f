# What a whole Debian does while it is installed under itself, when it is in multi-user mode; and again when it starts
# from its own disk. Its output goes to the serial line.
exec >/dev/ttyS0 2>&1
fail() { echo "METAL-EXIT 1: $*"; systemctl --force poweroff; exit 1; }
disk=/dev/$(lsblk -ndo PKNAME "$(findmnt -no SOURCE /)")
# VM_CR: reads as switched off while there is a VMM.
modprobe msr
under() { for c in $(seq 0 $(($(nproc) - 1))); do
    dd if=/dev/cpu/$c/msr bs=8 iflag=skip_bytes skip=$((0xc0010114)) count=1 2>/dev/null | od -An -tx8
done | grep -c 18; }
# Data that is written with its sums, and read back from the disk.
verify() { fio --name=verify --directory=/var/tmp --size=24M --rw=randwrite --bsrange=4k-64k --direct=1 --ioengine=libaio \
    --iodepth=8 --verify=crc32c --randseed=7 --output=/run/fio.log "$@" && ! grep -q 'verify:.*error' /run/fio.log; }

echo "MULTI-USER $(nproc) CPUs, $(cut -d' ' -f1 /proc/uptime) s, $(under) with a VMM, $(systemctl list-units --failed --no-legend | wc -l) failed"
if [ -e /var/lib/first-boot-done ]; then
    verify --verify_only || fail "fio, from its own disk: $(cat /run/fio.log)"
    [ "$(under)" = 0 ] || fail "a VMM"
    echo "FROM-OWN-DISK"
else
    # All that has not come is wanted from now on.
    cat "$disk" >/dev/null &
    verify || fail "fio: $(cat /run/fio.log)"
    echo "FIO-VERIFIED, $(under) CPUs with a VMM"
    mount -o ro LABEL=CIDATA /mnt || fail "no seed"
    apt-get -qq install -y /mnt/*.deb >/run/apt.log 2>&1 || fail "apt-get install: $(cat /run/apt.log)"
    [ "$(hello)" = "Hello, world!" ] || fail "hello"
    apt-get -qq purge -y hello >/run/apt.log 2>&1 || fail "apt-get purge: $(cat /run/apt.log)"
    apt-get -qq install -y /mnt/*.deb >/run/apt.log 2>&1 || fail "apt-get install: $(cat /run/apt.log)"
    umount /mnt
    echo PACKAGES-DONE
    wait
    until [ "$(under)" = 0 ]; do sleep 0.5; done
    echo "LEFT"
    echo 3 >/proc/sys/vm/drop_caches
    verify --verify_only || fail "fio after it: $(cat /run/fio.log)"
    echo "VERIFIED-AFTER"
    touch /var/lib/first-boot-done
fi
sync
echo "METAL-EXIT 0"
systemctl --no-block poweroff
