# A VM moves between two instances with different virtual hardware, linked by a network of
# QEMU's: from the module on virtio without virtualization to KVM on NVMe and e1000e, and
# back. It counts, writes the numbers to its disk and sends them to the first instance over
# TCP; it keeps its address, its connection and its disk. What its client saw is printed.
say() { read -r up _ </proc/uptime; echo "  [$up s] $*"; }
# A command in the other instance, whose shell listens anew after each.
other() { until echo "cd /root; $*" | nc 10.77.0.2 7001 2>/dev/null; do sleep 0.2; done; }
other true
say "two instances: here virtio without virtualization; there NVMe, e1000e and SVM"

bridge='brctl addbr br0; brctl addif br0 eth0; tunctl -t vm0 >/dev/null; brctl addif br0 vm0
    ip link set vm0 up; ip link set br0 up; ip addr flush dev eth0; ip addr add 10.77.0.NODE/24 dev br0'
# The connection that this comes over breaks with the address.
other "(sleep 0.2; ${bridge%NODE*}2${bridge#*NODE}) >/dev/null 2>&1 &"
eval "${bridge%NODE*}1${bridge#*NODE}"
until [ "$(other echo bridged)" = bridged ]; do sleep 0.2; done
# The client: each line with the time at which it came.
tail -f /dev/null | nc -l -p 7000 | while read -r line; do
    read -r up _ </proc/uptime
    echo "$line $up"
done >stream &

echo "$sums" >script
cat >>script <<'S'
until [ -e /sys/class/net/eth0 ] && [ -b /dev/xvda ]; do sleep 0.1; done
ip addr add 10.77.0.50/24 dev eth0
ip link set eth0 up
check sum &
mkfifo /tmp/out
nc 10.77.0.1 7000 </tmp/out &
exec 3>/tmp/out
n=0
until [ -e /tmp/end ]; do
    n=$((n + 1))
    printf '%-512s' "BLOCK $n" | dd of=/dev/xvda bs=512 seek=$((n * 37)) conv=notrunc,fsync 2>/dev/null || echo WRONG disk
    echo "LINE $n $(cut -d. -f1 /proc/uptime)" >&3
    read -t 1 word && [ "$word" = end ] && touch /tmp/end
done
exec 3>&-
touch /tmp/stop
wait
S
lab-initrd script >initrd
vm="--memory 160M --cpus 2 --disk disk.raw --net tap=vm0,mac=02:00:00:00:77:50 --detach --console file:vm.log"
image='blanket disk create --format raw --size 8M disk.raw >/dev/null'
waits='blanket run --incoming 0.0.0.0:7100 --token-file token --name vm'
last() { sed -n 's/^LINE \([0-9]*\) .*/\1/p' stream | tail -n 1; }
counted() {
    to=$(($(last) + $1))
    tries=0
    until [ "$(last)" -ge $to ] 2>/dev/null; do
        tries=$((tries + 1))
        [ $tries -lt 600 ] || fail "it counts no further than $(last) ($2)"
        sleep 0.2
    done
}
: >vm.log
eval "$image" || fail "no image"
blanket run --name vm --kernel /guest/vmlinuz --initrd initrd $vm --host module \
    --cmdline "console=hvc0 panic=-1" >/dev/null || fail "it does not start"
counted 4 "before it moves"
say "a VM counts, writes to its disk, and sends each number to a client over TCP: $(last) so far"
# moved TO: what the last migration cost, and the longest that the client waited for a number.
figure() { sed -n "s/.*\"$1\": \([0-9]*\).*/\1/p" moved; }
waited() {
    awk -v from=$1 '$2 >= from { if (last && $4 - last > most) most = $4 - last; last = $4 }
        END { printf "%.1f", most }' stream
}
table="            rounds   MiB sent   stood still   client waited"
report() {
    row=$(printf '%-10s  %6s   %8s   %8s ms   %11s s' "$1" $(figure rounds) $(($(figure bytes) / 1048576)) \
        $(figure downtime_ms) $(waited $before))
    table="$table
$row"
}
uuid=$(blanket ps --json | grep '"uuid"')

other "$image; $waits $vm --host kvm" 2>&1
token=$(other cat token)
before=$(last)
blanket migrate vm --to 10.77.0.2:7100 --token "$token" --json >moved || fail "there: $(cat moved); $(other cat vm.log)"
counted 5 "in the other instance"
[ "$(other 'blanket ps --json' | grep '"uuid"')" = "$uuid" ] || fail "it is another one"
other 'blanket ps --json' | grep -q '"host": "kvm"' || fail "it is not on KVM"
! blanket stats vm 2>/dev/null || fail "it is in both"
report "to KVM"
say "it runs in the other instance, inside KVM; its client has $(last)"

rm -f disk.raw token
eval "$image; $waits $vm --host module" || fail "nobody waits"
token=$(cat token)
before=$(last)
other "blanket migrate vm --to 10.77.0.1:7100 --token $token --json 2>&1" >moved
grep -q '"stage": "moved"' moved || fail "back: $(cat moved)"
counted 5 "back"
report "back"
say "it is back, under the module; its client has $(last)"
echo end | blanket console vm >/dev/null 2>&1 &
until ! blanket stats vm >/dev/null 2>&1; do sleep 0.2; done
tr -d '\r' <vm.log | grep -qx 'GUEST-EXIT 0' || fail "it did not end well"
! grep WRONG vm.log || fail "it computes wrong"
! other cat vm.log | grep WRONG || fail "it computed wrong there"
end=$(last)
sed -n 's/^LINE \([0-9]*\) .*/\1/p' stream >counted
seq $end | cmp - counted || fail "numbers are missing, or come twice"
# Its clock goes on, and never back.
awk '{ print $3 }' stream >seconds
sort -n seconds | cmp - seconds || fail "its clock went back"
for n in $(seq $end); do
    block=$(dd if=disk.raw bs=512 skip=$((n * 37)) count=1 2>/dev/null)
    [ "$block" = "$(printf '%-512s' "BLOCK $n")" ] || fail "block $n is $block"
done
say "no number lost or twice, every block on its disk, one connection: $end numbers"
echo "$table"
echo "MIGRATE-OK"
