# Networks of two VMs: with their instance over a tap and in user mode, and with each other
# over a bridge; IPv4 and IPv6, TCP and UDP, both ways. net-check compares every byte.
# CPUS is how many vCPUs the first has.
brctl addbr br0
for tap in vm1 vm2; do
    tunctl -t $tap >/dev/null || fail "no tap"
    brctl addif br0 $tap
    ip link set $tap up
done
ip addr add 10.88.0.254/24 dev br0
ip addr add fd88::fe/64 dev br0
ip link set br0 up
# passt does without IPv6, and binds no address of it, where the interface has no link-local one. The kernel
# makes that when it has seen the link, up to a second after init has set it up.
until ip -6 addr show dev eth0 scope link | grep -q inet6; do sleep 0.1; done
# For user mode a way out, which leads nowhere here. Its gateway is the instance itself.
# The one that QEMU announces does not stay.
echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_ra
while ip -6 route del default 2>/dev/null; do :; done
echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad
ip addr add fd77::1/64 dev eth0
ip route add default via 10.77.0.254
ip -6 route add default via fe80::fe dev eth0 || fail "no way out: $(ip -6 addr; ip -6 route)"
touch serve.log first.log second.log instance.log
tail -q -n +1 -f serve.log first.log second.log instance.log &
# Not the number of the guests' servers: passt gives the forwarded port up three minutes after
# a server of that number outside has spoken to its guest (docs/network.md).
net-check serve 7010 >serve.log 2>&1 &

cat >first <<'S'
for dev in eth0 eth1; do
    until [ -e /sys/class/net/$dev ]; do sleep 0.1; done
    echo 0 >/proc/sys/net/ipv6/conf/$dev/accept_dad
done
ip addr add 10.88.0.1/24 dev eth0
ip addr add fd88::1/64 dev eth0
ip link set eth0 up
# The instance's own addresses, as passt gives them.
ip addr add 10.77.0.1/24 dev eth1
ip addr add fd77::1/64 dev eth1
ip link set eth1 mtu 65520
ip link set eth1 up
net-check --stream 8388608 run user 10.77.0.254:7010 || exit 1
# passt answers datagrams over IPv6 with a gateway's address if that is a link's only.
net-check --stream 8388608 run user-v6 "[fe80::fe%$(cat /sys/class/net/eth1/ifindex)]:7010" || exit 1
# passt drops nothing of a stream, or it would stand still.
awk '/^TcpExt:/ { if (n++) { for (i in at) print at[i], $i } else split($0, at) }' /proc/net/netstat >counts
grep -x 'TCPOFOQueue 0' counts || { cat counts; exit 1; }
ip link set eth1 mtu 1500
net-check --largest 1400 run user-1500 10.77.0.254:7010 || exit 1
net-check serve 7000 &
serves=$!
for where in tap=10.88.0.254:7010 'tap-v6=[fd88::fe]:7010' vm=10.88.0.2:7000 'vm-v6=[fd88::2]:7000'; do
    net-check run "${where%%=*}" "${where#*=}" || exit 1
done
# Until the instance has done as much.
wait $serves
S
cat >second <<'S'
until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done
echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad
ip addr add 10.88.0.2/24 dev eth0
ip addr add fd88::2/64 dev eth0
ip link set eth0 up
net-check serve 7000
S

ports=tcp=127.0.0.1/7101:7000,udp=127.0.0.1/7101:7000,tcp=::1/7102:7000,udp=::1/7102:7000
guest first --cpus ${CPUS:-2} --name first --net tap=vm1 --net user,$ports >first.log 2>&1 &
first=$!
guest second --name second --net tap=vm2 >second.log 2>&1 &
second=$!

until grep -q NET-CHECK-SERVES first.log; do kill -0 $first 2>/dev/null || fail "the first VM"; sleep 0.5; done
for where in tap-in=10.88.0.1:7000 'tap-in-v6=[fd88::1]:7000' 'user-in=127.0.0.1:7101' 'user-in-v6=[::1]:7102'; do
    largest=60000
    case $where in user*) largest=1400 ;; esac
    net-check --largest $largest run "${where%%=*}" "${where#*=}" >>instance.log 2>&1 || fail "$where"
done
net-check stop 10.88.0.1:7000 || fail "the first VM does not stop"
wait $first || fail "the first VM"
net-check stop 10.88.0.2:7000 || fail "the second VM does not stop"
wait $second || fail "the second VM"
! grep -H 'net-check:' *.log || fail "a server had something to say"
echo NETWORK-OK
