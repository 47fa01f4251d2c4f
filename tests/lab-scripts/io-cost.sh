# What disks and networks cost, for `cargo xtask bench --io`, in an instance with one CPU
# whose instructions are counted: natively, then in a VM for each of $HOSTS. IO_COST is the
# program with its options. The instance has three disks that cost nothing by themselves
# (/dev/vdb, vdc and vdd); files lie on its tmpfs.
fail() {
    echo "FAILED: $*"
    cat serve.log
    exit 1
}
dir=$(mktemp -d)
cd "$dir" || fail "no directory"

io-cost serve >serve.log 2>&1 &
until grep -q IO-COST-SERVES serve.log 2>/dev/null; do kill -0 $! || fail "$(cat serve.log)"; sleep 0.1; done
cat serve.log

# The instance against itself: another network namespace, a loop device on a file.
unshare -n sleep 1000000 &
other=$!
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do :; done
there() { nsenter -t $other -n "$@"; }
ip link add ours type veth || fail "no veth"
ip link set veth0 netns $other || fail "no namespace"
ip addr add 10.98.0.1/24 dev ours
ip link set ours up
there ip addr add 10.98.0.2/24 dev veth0
there ip link set veth0 up
truncate -s 32M loop.raw && losetup /dev/loop0 loop.raw || fail "no loop device"
echo IO-COST-PLACE native
there $IO_COST disk 10.98.0.1 disk /dev/vdb raw /dev/loop0 >rows || fail "natively: $(cat rows)"
there $IO_COST net 10.98.0.1 veth >>rows || fail "natively: $(cat rows)"
cat rows
losetup -d /dev/loop0 && rm loop.raw
ip link del ours
kill $other

# The VM's networks: a tap, and user mode, which has to see a way out.
tunctl -t vm0 >/dev/null
ip addr add 10.99.0.1/24 dev vm0
ip link set vm0 up
ip route add default via 10.77.0.254
for host in $HOSTS; do
    rm -f *.raw *.qcow2
    for name in plain persistent; do
        truncate -s 32M $name.raw
        blanket disk create $name.qcow2 --size 32M || fail "no image"
    done
    echo IO-COST-PLACE $host
    # shellcheck disable=SC2086
    blanket run --name io --host $host --kernel /guest/vmlinuz --initrd /guest/initrd.img \
        --memory 512M --cpus 1 --cmdline 'console=hvc0 quiet' \
        --disk /dev/vdc,format=raw --disk /dev/vdd,format=raw,persistent \
        --disk plain.raw --disk persistent.raw,persistent \
        --disk plain.qcow2 --disk persistent.qcow2,persistent \
        --net tap=vm0 --net user >vm.log || fail "the VM ended with $?"
    cat vm.log
    grep -q 'GUEST-EXIT 0' vm.log || fail "it did not measure all"
done
