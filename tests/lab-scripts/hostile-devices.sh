# Runs in an instance: a kernel that attacks the xenstore and the backends of its disks
# and its network, seed after seed, beside a VM that works. It says by itself what must
# hold after each attack, and ends as crashed if something does not; what it must not
# have changed is compared here.
#   SEEDS  how many; FIRST  the first seed; STEPS  families of attacks in each
seeds=${SEEDS:-4}
first=${FIRST:-1}
tunctl -t vm0 >/dev/null
ip addr add 192.168.77.1/24 dev vm0
ip link set vm0 up
# 4 MiB of which no two sectors are alike. The guest may write the first half.
seq 1000000 1524287 >pattern
half=2097152
tail -c $half pattern >pattern.tail
start neighbour
ticking neighbour
total=0

# attack SEED: one VM.
attack() {
    cp pattern first.raw
    cp pattern second.raw
    blanket run --detach --name hostile --kernel /bin/hostile --memory 32M --on-reboot exit \
        --disk first.raw --disk second.raw --net tap=vm0,filter --console file:hostile.log \
        --cmdline "devices=1 seed=$1 steps=${STEPS:-10}" >/dev/null || fail "seed $1 does not start: $?"
    until grep -aq '^HOSTILE-DEVICES seed=' hostile.log; do
        blanket stats hostile >/dev/null 2>&1 || fail "seed $1 ended"
        sleep 0.2
    done
    line=$(tr -d '\r' <hostile.log | sed -n 's/^HOSTILE-DEVICES //p')
    echo "$line"
    n=$(echo "$line" | tr ' ' '\n' | awk -F= '/^(store|disk|net)=/ { n += $2 } END { print n }')
    total=$((total + n))
    blanket disk list hostile >disks || fail "seed $1: no list of disks"
    blanket net list hostile >nets || fail "seed $1: no list of networks"
    case $line in
    *end=devices-broken)
        cat disks nets
        grep -q 'xvda.*closing' disks || fail "seed $1: a broken disk is not closing"
        grep -q 'xvdb.*connected' disks || fail "seed $1: another disk is not connected"
        grep -q 'eth0.*closing' nets || fail "seed $1: a broken network is not closing"
        grep -q '^xvda: the guest has .* requests in a ring of' disks || fail "seed $1: no word why"
        blanket stop hostile --timeout 60 || fail "seed $1: it does not end when it is asked to"
        ;;
    *end=store-broken)
        grep -q 'xvda.*connected' disks || fail "seed $1: a disk that works is not connected"
        blanket kill hostile || fail "seed $1: kill: $?"
        ;;
    *end=directories-gone)
        cat disks nets
        grep -q 'xvda.*closed' disks || fail "seed $1: a disk without a frontend is not closed"
        blanket disk detach hostile xvda --timeout 20 || fail "seed $1: it is not detached"
        blanket stop hostile --timeout 60 || fail "seed $1: it does not end when it is asked to"
        ;;
    *) fail "seed $1: another end" ;;
    esac
    while blanket stats hostile >/dev/null 2>&1; do sleep 0.1; done
    cmp second.raw pattern || fail "seed $1: the second disk has changed"
    tail -c $half first.raw | cmp - pattern.tail || fail "seed $1: sectors have changed that it did not write"
    [ "$(hexdump -n 4 -e '1/4 "%08x"' first.raw)" = 600d600d ] || fail "seed $1: its last write is not there"
    blanket stats neighbour >/dev/null && ! grep -q BAD neighbour.log || fail "the neighbour noticed seed $1"
    rm hostile.log
}

seed=$first
while [ $seed -lt $((first + seeds)) ]; do
    attack $seed
    seed=$((seed + 1))
done
ticking neighbour
echo "HOSTILE-DEVICES-TOTAL seeds=$seeds requests=$total seconds=$(cut -d. -f1 /proc/uptime)" \
    "neighbour-worked=$(ticks neighbour)"
blanket kill neighbour || fail "kill: $?"
echo "HOSTILE-DEVICES-OK"
