# A network of VMs over two instances: addresses and names from DHCP and DNS, a VM that moves with its
# connections inside the network, to the outside and from it, published ports, and nothing of it on the
# wire but WireGuard. The outside is a network namespace behind the second instance.

# The outside: 10.79.0.2 behind the other instance, which was a router before.
other 'echo 1 >/proc/sys/net/ipv4/ip_forward
    unshare -n sleep 2147483647 >/dev/null 2>&1 & echo $! >world
    until [ "$(readlink /proc/$!/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
    ip link add w0 type veth; ip link set veth0 netns $(cat world)
    ip addr add 10.79.0.1/24 dev w0; ip link set w0 up
    nsenter -t $(cat world) -n sh -c "ip link set lo up; ip addr add 10.79.0.2/24 dev veth0
        ip link set veth0 up; ip route add default via 10.79.0.1"' 2>&1
ip route add 10.79.0.0/24 via 10.77.0.2
ping -c 1 -W 5 10.79.0.2 >/dev/null || fail "no outside: $(other 'ip addr; cat world; ps')"

web=02:00:00:00:0a:01
db=02:00:00:00:0a:02
web_tap=sct020000000a01
db_tap=sct020000000a02
# record NODE OTHER KEY
record() {
    cat <<R
{ "node": $1, "peers": [{ "node": $2, "public_key": "$3", "endpoint": "10.77.0.$2:51820" }],
  "networks": [{ "name": "demo", "vni": 5, "subnet": "10.5.0.0/16", "ports": [
    { "name": "web", "mac": "$web", "address": "10.5.0.10", "node": 1, "publish": [
        { "port": 8080, "to": 80 }, { "port": 8081, "to": 81 }] },
    { "name": "db", "mac": "$db", "address": "10.5.0.11", "node": 2 }] }] }
R
}
key=$(fabric key)
record 1 2 "$(other fabric key)" >record
record 2 1 "$key" >there
mv record here
cp there record
put record
mv here record
fabric apply record >done || fail "apply: $(cat done)"
fabric apply record >again || fail "apply again: $(cat again)"
! grep -v 'load the rules' again || fail "it was not done"
other fabric apply record 2>&1 >there
say "two nodes: $(wc -l <done) steps here, $(wc -l <there) there"
ping -c 1 -W 10 100.127.64.2 >/dev/null || fail "no fabric: $(cat there; ip addr; ip route)"

# What crosses the wire from now on, at both ends: WireGuard, what this script itself uses, and the rest.
cat >wire.nft <<'N'
table netdev wire {
  counter wireguard { }
  counter rest { }
  chain in {
    type filter hook ingress device "eth0" priority -500; policy accept;
    udp dport 51820 counter name wireguard accept
    tcp dport { 7001, 7100, 8080, 8081 } accept
    tcp sport { 7001, 7100, 8080, 8081 } accept
    ip saddr 10.79.0.2 tcp sport 9000 accept
    ip daddr 10.79.0.2 tcp dport 9000 accept
    ether type { arp, ip6 } accept
    counter name rest
  }
}
N
put wire.nft
nft -f wire.nft && other nft -f wire.nft 2>&1 || fail "no counters"
wire() { nft list counter netdev wire $1 | sed -n 's/.*packets \([0-9]*\).*/\1/p'; }
other_wire() { other "nft list counter netdev wire $1" | sed -n 's/.*packets \([0-9]*\).*/\1/p'; }

cat /tmp/lease.sh - >web.sh <<'V'
ping -c 1 -W 10 db && echo PINGED
while :; do echo "the page of web" | nc -l -p 80; done &
numbers IN | nc db 7000 &
numbers OUT | nc 10.79.0.2 9000 &
numbers PUB | nc -l -p 81 &
while read -r word; do
    case $word in
    lease) lease ;;
    end) break ;;
    esac
done
touch /tmp/end
sleep 1
V
cat /tmp/lease.sh - >db.sh <<'V'
nc -l -p 7000 | while read -r line; do
    read -r up _ </proc/uptime
    echo "$line $up"
done
V
lab-initrd web.sh >web.img
put db.sh
other 'lab-initrd db.sh >db.img'
other '(tail -f /dev/null | nsenter -t $(cat world) -n nc -l -p 9000 | while read -r line; do
    read -r up _ </proc/uptime; echo "$line $up"; done) >out 2>&1 &'
vm="--kernel /guest/vmlinuz --memory 128M --host module --detach"
net() { echo "--net tap=sct$(echo $1 | tr -d :),mac=$1,filter"; }
other "blanket run --name db --initrd db.img $vm $(net $db) --console file:db.log --cmdline 'console=hvc0 quiet panic=-1'" 2>&1
# Whom web talks to is there first.
until_true "db has no lease" 'other cat db.log | grep -q LEASE'
blanket run --name web --initrd web.img $vm $(net $web) --console file:web.log \
    --cmdline "console=hvc0 quiet panic=-1" >/dev/null || fail "web does not start"

log() { tr -d '\r' <$1; }
until_true "web has no lease" 'log web.log | grep -q "^LEASE"'
is "LEASE web 10.5.0.10/16 mtu 1370 via 10.5.0.1 dns 10.5.0.1 search demo.internal" \
    "$(log web.log | grep LEASE)" "what web got"
until_true "web does not reach db by its name" 'log web.log | grep -q PINGED'
say "web here and db there have their addresses, and web has found db by its name"

# Ports of both nodes lead to it; a client outside holds a connection through the first node's.
# Between two answers nobody listens for a moment.
page() { until nc $1 8080 </dev/null 2>/dev/null | grep .; do sleep 0.1; done; }
is "the page of web" "$(page 10.77.0.2)" "the page, through the other node's port"
is "the page of web" "$(page 10.77.0.1)" "the page, through this node's port"
other '(tail -f /dev/null | nsenter -t $(cat world) -n nc 10.77.0.1 8081 | while read -r line; do
    read -r up _ </proc/uptime; echo "$line $up"; done) >pub 2>&1 &'
# last WHAT: the last number of that connection.
last() {
    case $1 in
    IN) other cat db.log | tr -d '\r' ;;
    OUT) other cat out ;;
    PUB) other cat pub ;;
    esac | sed -n "s/^$1 \([0-9]*\) .*/\1/p" | tail -n 1
}
counted() {
    for what in IN OUT PUB; do
        from=$(last $what)
        until_true "$what counts no further than $(last $what) ($1)" "[ \$(last $what) -ge $((${from:-0} + 10)) ]"
    done
}
counted "before it moves"
say "numbers run from web to db, to the outside, and through a published port to a client outside"
# waited WHAT FROM: the longest time between two numbers after FROM, in seconds.
waited() {
    case $1 in
    IN) other cat db.log | tr -d '\r' ;;
    OUT) other cat out ;;
    PUB) other cat pub ;;
    esac | awk -v what=$1 -v from=$2 '$1 == what && $2 >= from {
        if (last && $3 - last > most) most = $3 - last; last = $3 } END { printf "%.1f", most }'
}

# moves FROM TO: a tap there first; then the VM, and at its switch the entries on both nodes.
table="          stood still   longest wait of db   of the outside   of the client outside"
moves() {
    from_in=$(last IN) from_out=$(last OUT) from_pub=$(last PUB)
    fabric arrives record $web $2
    fabric apply record >done || fail "apply: $(cat done)"
    other "fabric arrives record $web $2; fabric apply record" >done 2>&1
    ! grep -q rror done || fail "apply there: $(cat done)"
    waits="rm -f token; blanket run --incoming 0.0.0.0:7100 --token-file token --name web ${vm#* * } $(net $web) --console file:web.log"
    case $2 in
    2)
        other "$waits" 2>&1
        blanket migrate web --to 10.77.0.2:7100 --token "$(other cat token)" --json >moved ||
            fail "to $2: $(cat moved); $(other cat web.log)"
        ;;
    1)
        eval "$waits" >/dev/null || fail "nobody waits"
        other "blanket migrate web --to 10.77.0.1:7100 --token $(cat token) --json 2>&1" >moved
        ;;
    esac
    grep -q '"stage": "moved"' moved || fail "to $2: $(cat moved)"
    other "fabric moved record $web $2" 2>&1 &
    fabric moved record $web $2 || fail "moved"
    wait $!
    fabric apply record >done || fail "apply: $(cat done)"
    other "fabric apply record" >done 2>&1
    ! grep -q rror done || fail "apply there: $(cat done)"
    counted "on node $2"
    table="$table
to node $2     $(printf '%5d ms          %8s s       %8s s               %8s s' \
        "$(sed -n 's/.*"downtime_ms": \([0-9]*\).*/\1/p' moved)" \
        "$(waited IN $from_in)" "$(waited OUT $from_out)" "$(waited PUB $from_pub)")"
}
moves 1 2
is "the page of web" "$(page 10.77.0.1)" "the page, through a node that it has left"
# The other node's DHCP gives it the same.
other 'echo lease | blanket console web >/dev/null 2>&1 &'
until_true "no lease there" '[ "$(other cat web.log | tr -d "\r" | grep -c "^LEASE web 10.5.0.10/16")" = 1 ]'
say "web runs there: all connections went on, and DHCP there gives it the same address"
moves 2 1
say "web is back"

echo end | blanket console web >/dev/null 2>&1 &
until_true "web does not end" '! blanket stats web >/dev/null 2>&1'
for what in IN OUT PUB; do
    end=$(last $what)
    case $what in
    IN) other cat db.log | tr -d '\r' ;;
    OUT) other cat out ;;
    PUB) other cat pub ;;
    esac | sed -n "s/^$what \([0-9]*\) .*/\1/p" >numbers
    seq "$end" | cmp - numbers || fail "$what: numbers are missing, or come twice"
done
inside=$(wire wireguard) outside=$(other_wire wireguard)
is "0 0" "$(wire rest) $(other_wire rest)" "packets on the wire that are not WireGuard"
[ "$inside" -gt 100 ] && [ "$outside" -gt 100 ] || fail "WireGuard has carried $inside and $outside packets"
say "no number lost or twice; on the wire $inside and $outside packets of WireGuard, and nothing else of the network"
echo "$table"

fabric clear >done || fail "clear: $(cat done)"
[ -z "$(ip link | grep ' sc')$(nft list tables | grep supercloud)$(ip rule | grep -v -E 'local|main|default')" ] ||
    fail "something is left: $(ip link; nft list tables; ip rule)"
echo VIRTUAL-NETWORK-OK
