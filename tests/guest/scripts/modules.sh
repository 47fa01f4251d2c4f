#!/bin/sh
# Loads and removes stock kernel modules and sends traffic between two network
# namespaces over a veth pair. Needs, besides what stress.sh needs, veth.ko and
# dummy.ko of the running kernel, not compressed, in $MODULES (default
# /lib/modules): find them in the kernel's package under kernel/drivers/net/.
. "${0%/*}/lib.sh"

MODULES=${MODULES:-/lib/modules}

module() {
    file=$(find "$MODULES" -name "$1.ko" | head -n 1)
    [ -n "$file" ] || fail "no $1.ko under $MODULES"
    echo "$file"
}

load_and_remove() {
    file=$(module dummy) || fail "$file"
    for i in $(seq 1 "$(count 20)"); do
        insmod "$file" numdummies=2 || fail "insmod $i"
        ip link set dummy1 up || fail "dummy1 in round $i"
        rmmod dummy || fail "rmmod $i"
    done
}

# Not a module: the loader must refuse it and the kernel live.
refuse_damaged() {
    file=$(module dummy) || fail "$file"
    head -c 1500 "$file" >short.ko
    insmod short.ko && fail "a truncated module was loaded"
    head -c 4096 /dev/zero >zero.ko
    insmod zero.ko && fail "zeros were loaded"
    return 0
}

veth_traffic() {
    file=$(module veth) || fail "$file"
    grep -q ^veth /proc/modules || insmod "$file" || fail insmod
    unshare -n sleep 1000 &
    other=$!
    trap 'kill $other; ip link del ours' EXIT
    # The namespace is there when it differs from ours.
    until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do :; done
    there() { nsenter -t $other -n "$@"; }
    ip link set lo up
    # The kernel names the other end.
    ip link add ours type veth || fail "ip link add"
    ip link set veth0 netns $other || fail "netns"
    ip addr add 10.99.0.1/24 dev ours
    ip link set ours up
    there ip addr add 10.99.0.2/24 dev veth0
    there ip link set veth0 up
    ping -c 3 -i 0.2 -s 1400 10.99.0.2 || fail ping
    dd if=/dev/urandom of=sent bs=64k count="$(count 64)" 2>/dev/null
    # nc closes the connection when its input ends, so the receiver's stays open.
    mkfifo hold
    exec 3<>hold
    there nc -l -p 5000 <hold >received &
    receiver=$!
    until there netstat -ltn | grep -q :5000; do :; done
    nc 10.99.0.2 5000 <sent || fail nc
    wait $receiver
    cmp sent received || fail "what arrived is not what was sent"
    rm sent received hold
}

remove_veth() { rmmod veth; }

check load_and_remove load_and_remove
check refuse_damaged refuse_damaged
check veth_traffic veth_traffic
check remove_veth remove_veth
summary
