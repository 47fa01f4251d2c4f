# Two instances with different virtual hardware become two nodes: the second one joins by a
# token. A VM is run, listed and moved by its name, there and back, while it counts, writes to
# its disk and sends each number to a client over TCP. The first one's agent is killed (-9) meanwhile,
# at rest and in the middle of a move: the VM does not notice, and what is listed is true.
bridged vm0
tail -f /dev/null | nc -l -p 7000 >stream &

echo "$sums" >script
echo "$hears" >>script
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
    echo "LINE $n" >&3
    sleep 1
done
exec 3>&-
# Past its cache: what the images have.
echo 3 >/proc/sys/vm/drop_caches
i=0
while [ $i -lt $n ]; do
    i=$((i + 1))
    block=$(dd if=/dev/xvda bs=512 skip=$((i * 37)) count=1 2>/dev/null)
    [ "$block" = "$(printf '%-512s' "BLOCK $i")" ] || echo "WRONG block $i: $block"
done
[ "$(dd if=/dev/xvda bs=512 count=1 2>/dev/null | head -c 4)" = BASE ] || echo "WRONG base"
touch /tmp/stop
wait
S
lab-initrd script >initrd
last() { sed -n 's/^LINE //p' stream | tail -n 1; }
counted() {
    to=$(($(last) + $1))
    tries=0
    until [ "$(last)" -ge $to ] 2>/dev/null; do
        tries=$((tries + 1))
        [ $tries -lt 600 ] || fail "it counts no further than $(last) ($2): $(supercloud vm list)"
        sleep 0.2
    done
}

# ---- two nodes ----
killed() { kill -9 $agent; wait $agent 2>/dev/null; }
two_nodes a b
supercloud node list
# A token is for one node.
other "supercloud node start --data /root/c --name c --listen 10.77.0.2:7701 --join '$token' 2>&1" >said
grep -q 'used up' said || fail "the token is good for two: $(cat said)"
supercloud node doctor >said 2>&1
# The clocks of emulated instances differ by up to a second or two.
grep -q '^[a-z]* *node b  *answers' said || fail "the doctor does not see b: $(cat said)"

# ---- a VM ----
blanket disk create --format raw --size 8M base.raw >/dev/null || fail "no image"
printf BASE | dd of=base.raw conv=notrunc 2>/dev/null
supercloud image add base.raw >/dev/null || fail "no base image"
run() {
    supercloud vm run base --name web --kernel /guest/vmlinuz --initrd initrd --memory ${1:-160M} --cpus 2 --net tap=vm0 \
        --cmdline "console=hvc0 panic=-1"
}
run || fail "it does not start"
run >/dev/null || fail "twice is not as once"
run 128M 2>said && fail "there are two"
is 4 $? "another one by that name"
supercloud vm migrate web --to c 2>said && fail "there is a node c"
is 3 $? "an unknown node"
counted 3 "before it moves"
say "it counts on a: $(last)"

# Its agent is killed; the VM is not.
killed
counted 2 "without an agent"
supercloud vm list 2>said && fail "an agent is there"
is 5 $? "no agent"
agent a
until_true "it is not found again" 'supercloud vm list | grep -q "^web *a *running"'

# ---- there, and the agent that sends it is killed ----
on() { supercloud vm list | awk '$1 == "web" { print $2, $3 }'; }
uuid() { supercloud vm show web | awk '$1 == "uuid" { print $2 }'; }
first=$(uuid)
supercloud vm migrate web --to b --dry-run || fail "it cannot go to b"
supercloud vm migrate web --to b --id there --bandwidth 8M >moved 2>&1 &
moving=$!
until_true "it is not sent: $(cat moved)" 'supercloud vm show web | grep -q "^process *sending"'
killed
agent a
wait $moving || fail "it does not go to b: $(cat moved); $(tail -n 20 a.log)"
cat moved
is "b running" "$(on)" "where it is"
is "$first" "$(uuid)" "it is another one"
! blanket stats web >/dev/null 2>&1 || fail "it is on both"
counted 3 "on b"
other 'blanket ps' | grep -q ' kvm ' || fail "it is not inside KVM"
say "it runs on b, inside KVM, and counts: $(last)"
ls /var/lib/supercloud/vms/web 2>/dev/null && fail "something of it is left on a"
other "supercloud vm list" | grep -q '^web *b *running' || fail "b lists it otherwise"

# ---- back, and the agent that waits for it is killed ----
killed
agent a
until_true "no agent" 'supercloud node list | grep -q "^b .*reachable"'
supercloud vm migrate web --to a --id back >moved 2>&1 &
moving=$!
until_true "it is not sent: $(cat moved)" 'supercloud vm show web | grep -q "^process *sending"'
killed
counted 1 "while the destination has no agent"
agent a
wait $moving || fail "it does not come back: $(cat moved); $(tail -n 20 a.log)"
cat moved
is "a running" "$(on)" "where it is"
counted 2 "back on a"
say "it is back on a: $(last)"
[ "$(other 'blanket ps' | grep -c web)" = 0 ] || fail "it is on both"

echo end | supercloud vm console web >/dev/null 2>&1 &
until_true "it does not end" 'supercloud vm list | grep -q "^web *a *ended"'
supercloud vm logs web | tr -d '\r' | grep -qx 'GUEST-EXIT 0' || fail "it did not end well: $(supercloud vm logs web)"
! supercloud vm logs web | grep WRONG || fail "it computes wrong"
sed 's/^LINE //' stream >counted
seq $(last) | cmp - counted || fail "numbers are missing, or come twice"
supercloud vm rm web || fail "it cannot be removed"
is "" "$(on)" "it is gone"
kill $agent
wait $agent
is 0 $? "the agent's end"
echo "NODES-OK"
