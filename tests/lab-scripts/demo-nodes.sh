# What `./x demo` shows first. Two instances with different virtual hardware, linked by a network of QEMU's, become two
# nodes as of two clouds: `here` on virtio without virtualization, `there` on NVMe and e1000e with KVM. A VM on their
# virtual network serves a page and a stream of numbers, which it writes to its disk as well; it moves there and back by
# its name, while it runs. What its client saw is printed.
trap '[ $? = 0 ] || { echo "-- there"; other "tail -n 30 *.log; blanket ps"; echo "-- web"; supercloud vm logs web; }' EXIT

two_nodes here there
say "two instances, two nodes: here virtio without virtualization; there NVMe, e1000e and SVM"
supercloud node list

supercloud net create demo --subnet 10.5.0.0/16 || fail "no network"
blanket disk create --format raw --size 8M base.raw >/dev/null || fail "no image"
printf BASE | dd of=base.raw conv=notrunc 2>/dev/null
supercloud image add base.raw >/dev/null || fail "no base image"

cat /tmp/lease.sh >script
echo "$sums" >>script
cat >>script <<'V'
until [ -b /dev/xvda ]; do sleep 0.1; done
check sum & sums=$!
echo 0 >/tmp/n
printf '#!/bin/sh\necho "web has counted to $(cat /tmp/n)"\n' >/bin/page
chmod 755 /bin/page
while :; do nc -l -p 80 -e page; done &
mkfifo /tmp/out
nc -l -p 81 </tmp/out &
count() {
    exec 3>/tmp/out
    n=0
    until [ -e /tmp/end ]; do
        n=$((n + 1))
        printf '%-512s' "BLOCK $n" | dd of=/dev/xvda bs=512 seek=$n conv=notrunc,fsync 2>/dev/null || echo WRONG disk
        echo $n >/tmp/n
        echo "LINE $n $(cut -d. -f1 /proc/uptime)" >&3
        usleep 100000
    done
    exec 3>&-
}
count & counts=$!
until netstat -ltn | grep -q ':81 '; do sleep 0.1; done
echo SERVES
while read -r word; do
    [ "$word" != end ] || break
done
touch /tmp/end /tmp/stop
wait $counts
wait $sums
# Past its cache: what the disk has.
echo 3 >/proc/sys/vm/drop_caches
n=$(cat /tmp/n)
for i in $(seq $n); do
    block=$(dd if=/dev/xvda bs=512 skip=$i count=1 2>/dev/null)
    [ "$block" = "$(printf '%-512s' "BLOCK $i")" ] || echo "WRONG block $i: $block"
done
[ "$(dd if=/dev/xvda bs=512 count=1 2>/dev/null | head -c 4)" = BASE ] || echo "WRONG base"
V
lab-initrd script >web.img
supercloud vm run base --name web --net demo --publish 8080:80 --publish 8081:81 --kernel /guest/vmlinuz --initrd "$PWD/web.img" \
    --memory 160M --cpus 2 --cmdline "console=hvc0 quiet panic=-1" || fail "web does not start"
logs() { supercloud vm logs web | tr -d '\r'; }
until_true "web does not serve" 'logs | grep -q "^SERVES"'
# The client, by a port that is published on both nodes: each line with the time at which it came.
tail -f /dev/null | nc 10.77.0.1 8081 | while read -r line; do
    read -r up _ </proc/uptime
    echo "$line $up"
done >stream &
last() { sed -n 's/^LINE \([0-9]*\) .*/\1/p' stream | tail -n 1; }
counted() {
    to=$(($(last) + $1))
    until_true "it counts no further than $(last) ($2)" '[ "$(last)" -ge $to ] 2>/dev/null'
}
counted 10 "before it moves"
page() { until nc $1 8080 </dev/null 2>/dev/null | grep .; do sleep 0.1; done; }
say "$(logs | grep '^LEASE')"
say "a VM with a page and a stream of numbers; its page: $(page 10.77.0.1)"

table="                  rounds   MiB sent   stood still   client waited"
figure() { sed -n "s/.*\"$1\": \([0-9]*\).*/\1/p" moved | head -n 1; }
waited() {
    awk -v from=$1 '$2 >= from { if (last && $4 - last > most) most = $4 - last; last = $4 }
        END { printf "%.1f", most }' stream
}
for node in there here; do
    supercloud vm migrate web --to $node --dry-run --quiet || fail "web cannot go $node"
    before=$(last)
    supercloud vm migrate web --to $node --json >moved || fail "web does not go $node: $(cat moved)"
    counted 20 "$node"
    row=$(printf 'to %-12s  %6s   %8s   %8s ms   %11s s' "$node" $(figure rounds) $(($(figure bytes) / 1048576)) \
        $(figure downtime_ms) $(waited $before))
    table="$table
$row"
    supercloud vm list
    is "web $node running" "$(supercloud vm list | awk '$1 == "web" { print $1, $2, $3 }')" "where it is"
    say "it runs $node; its client has $(last); its page, by either node: $(page 10.77.0.1); $(page 10.77.0.2)"
done
echo end | supercloud vm console web >/dev/null 2>&1 &
until_true "it does not end" 'supercloud vm list | grep -q "^web .*ended"'
logs | grep -qx 'GUEST-EXIT 0' || fail "it did not end well"
! logs | grep WRONG || fail "it computes wrong"
end=$(last)
sed -n 's/^LINE \([0-9]*\) .*/\1/p' stream >counted
seq $end | cmp - counted || fail "numbers are missing, or come twice"
# Its clock goes on, and never back.
awk '{ print $3 }' stream >seconds
sort -n seconds | cmp - seconds || fail "its clock went back"
say "no number lost or twice, every block on its disk, one connection: $end numbers"
echo "$table"
supercloud vm rm web >/dev/null || fail "web cannot be removed"
supercloud net rm demo >/dev/null || fail "the network cannot be removed"
echo DEMO-NODES-OK
