# Runs in an instance: VMMs that change their VMs' memory while the vCPUs run, one trick
# after the other, beside a VM that works. The guest goes on with right data, or its VM
# ends and says why; nothing leaks, and the neighbour does not notice.
#   TRICKS  which; those that do not say so end in a VM that goes on
cat >held <<'S'
head -c 5m /dev/urandom >/tmp/held || { echo BAD held; exit 1; }
want=$(md5sum </tmp/held)
work() {
    n=0
    while :; do
        cp /tmp/held /tmp/copy.$1
        [ "$(md5sum </tmp/copy.$1)" = "$want" ] || { echo "BAD $1"; exit 1; }
        n=$((n + 1))
        echo "TICK $1 $n"
    done
}
work one &
work two
S
lab-initrd held >held.img
snapshot
start neighbour
ticking neighbour
for trick in $TRICKS; do
    timeout 600 vmm-tricks $trick /guest/vmlinuz held.img trick.log || fail "$trick"
    ticking neighbour
done
blanket kill neighbour
until ! blanket stats neighbour >/dev/null 2>&1; do sleep 0.1; done
nothing_leaked "after all tricks"
echo VMM-TRICKS-OK
