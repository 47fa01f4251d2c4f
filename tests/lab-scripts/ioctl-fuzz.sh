# Runs in an instance with the module loaded: programs that hold the device and mean
# ill, of two users at once, beside a VM that works. The kernel log must stay silent,
# the VM must not notice, and the module can be unloaded afterwards.
#   STEPS  calls of each of four threads of two programs; FIRST  the first seed
steps=${STEPS:-2000}
seed=${FIRST:-1}
nobody=65534
chmod 666 /dev/blanket
cat >/tmp/script <<'X'
n=0
while [ $n -lt 300 ]; do /bin/true || exit 1; n=$((n + 1)); done
for round in 1 2 3; do
    dd if=/dev/zero bs=1M count=20 2>/dev/null | md5sum | grep -q 8f4e33f3dc3e414ff94e5fb6905cba8c || exit 1
done
X
guest /tmp/script --name neighbour >/tmp/guest.log 2>&1 &
neighbour=$!

echo 5 >/sys/module/blanket/parameters/max_vms
ioctl-fuzz checks || exit 1
ioctl-fuzz checks $nobody || exit 1
echo 256 >/sys/module/blanket/parameters/max_vms

ioctl-fuzz random $seed $steps $nobody &
other=$!
ioctl-fuzz random $((seed + 1)) $steps || exit 1
wait $other || exit 1

wait $neighbour || { cat /tmp/guest.log; echo "FAILED: the neighbour noticed"; exit 1; }
rmmod blanket || { echo "FAILED: something of a VM is left"; exit 1; }
echo IOCTL-FUZZ-OK
