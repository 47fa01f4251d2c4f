# In VMs of virtual networks, before their own scripts: an address by DHCP, with all that was told, on a line of its
# own; and `numbers WORD`.
until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done
cat >/bin/got <<'U'
#!/bin/sh
[ "$1" = bound ] || exit 0
ip link set $interface mtu ${mtu:-9}
ip addr flush dev $interface
ip addr add $ip/$mask dev $interface
ip route add default via $router
{ echo "search $search"; for server in $dns; do echo "nameserver $server"; done; } >/etc/resolv.conf
echo "LEASE $hostname $ip/$mask mtu $mtu via $router dns $dns search $search"
U
chmod 755 /bin/got
ip link set eth0 up
lease() { udhcpc -f -i eth0 -n -q -t 20 -T 1 -s /bin/got -O search -O mtu -O hostname 2>/dev/null || echo NO LEASE; }
lease
numbers() {
    n=0
    until [ -e /tmp/end ]; do
        n=$((n + 1))
        echo "$1 $n"
        usleep 200000
    done
}
