# A VM that computes, writes to its disks and sends over a TCP connection, moves from one process to another and
# on, while it runs: MOVES of them, each on a host of HOSTS (module, kvm). No number that it
# counts is missing or comes twice, nothing that it computes is wrong, its connection holds,
# and its last images have all that it wrote.
brctl addbr br0
for tap in vm0 vm1; do
    tunctl -t $tap >/dev/null || fail "no tap"
    brctl addif br0 $tap
    ip link set $tap up
done
ip addr add 192.168.77.1/24 dev br0
ip link set br0 up
tail -f /dev/null | nc -l -p 7000 >stream &

# Nothing of this is sent: it cannot be compressed.
head -c 64m /dev/urandom >base.raw
base=$(md5sum <base.raw | cut -d' ' -f1)
end=$(tail -c 48m base.raw | md5sum)

echo "$sums" >script
echo "$hears" >>script
echo "end='$end'" >>script
cat >>script <<'S'
until [ -e /sys/class/net/eth0 ] && [ -b /dev/xvda ] && [ -b /dev/xvdb ]; do sleep 0.1; done
ip addr add 192.168.77.2/24 dev eth0
ip link set eth0 up
# Stays in its memory, and is in the base: named, not sent.
part() { dd if=/dev/xvdb bs=1M skip=16 count=16 2>/dev/null | md5sum; }
part=$(part)
check a & a=$!
check b & b=$!
mkfifo /tmp/out
nc 192.168.77.1 7000 </tmp/out &
exec 3>/tmp/out
n=0
until [ -e /tmp/end ]; do
    n=$((n + 1))
    echo "LINE $n" >&3
    # Far from each other, so that most are in blocks of their own.
    for disk in xvda xvdb; do
        printf '%-512s' "BLOCK $n" | dd of=/dev/$disk bs=512 seek=$((n * 37)) conv=notrunc,fsync 2>/dev/null || echo WRONG disk
    done
    echo "COUNT $n"
    sleep 1
done
exec 3>&-
[ "$(part)" = "$part" ] || echo WRONG memory
# Past its cache: what the images have.
echo 3 >/proc/sys/vm/drop_caches
for disk in xvda xvdb; do
    i=0
    while [ $i -lt $n ]; do
        i=$((i + 1))
        block=$(dd if=/dev/$disk bs=512 skip=$((i * 37)) count=1 2>/dev/null)
        [ "$block" = "$(printf '%-512s' "BLOCK $i")" ] || echo "WRONG block $i of $disk: $block"
    done
done
[ "$(dd if=/dev/xvdb bs=1M skip=16 2>/dev/null | md5sum)" = "$end" ] || echo WRONG base
touch /tmp/stop
wait $a && wait $b
S
lab-initrd script >initrd

vm="--memory 192M --cpus 2"
# Images of its own for each place: a raw one, and an overlay over what all places have.
images() {
    [ -e $1.raw ] || blanket disk create --format raw --size 8M $1.raw >/dev/null || fail "no image"
    [ -e $1.qcow2 ] || blanket disk create --backing base.raw $1.qcow2 >/dev/null || fail "no image"
    echo "--disk $1.raw --disk $1.qcow2$on"
}
on=,base=md5:$base
net() { echo "--net tap=vm$1,mac=02:00:00:00:77:02"; }
# A line may begin in one place and end in the next.
logs=vm.log
last() { cat $logs | tr -d '\r' | sed -n 's/^COUNT //p' | sort -n | tail -n 1; }
counted() {
    to=$(($(last) + $1))
    until [ "$(last)" -ge $to ]; do
        blanket stats $now >/dev/null 2>&1 || fail "$now is gone"
        sleep 0.2
    done
}
# waits NAME TAP [OPTIONS...]: a process that the VM can move to.
waits() {
    name=$1 tap=$2
    shift 2
    rm -f token
    blanket run --incoming 127.0.0.1:7100 --token-file token --name $name $vm $(images $name) $(net $tap) --detach \
        --console file:$name.log "$@" >/dev/null || fail "$name does not wait"
}

now=vm
blanket run --name vm --kernel /guest/vmlinuz --initrd initrd $vm $(images vm) $(net 0) --detach \
    --console file:vm.log --cmdline "console=hvc0 panic=-1" >/dev/null || fail "it does not start"
until grep -q '^COUNT' vm.log; do blanket stats vm >/dev/null 2>&1 || fail "it does not boot"; sleep 0.2; done
counted 3
identity() { blanket ps --json | grep -E '"(uuid|generation_id)"'; }
whose=$(identity)

# Who is not the destination, has not its token, or is of another size gets nothing.
! blanket migrate vm --to 127.0.0.1:7100 --token 00 --streams 9 2>err || fail "nine streams"
grep -q '1..=8' err || fail "no word about the streams: $(cat err)"
! blanket migrate vm --to 127.0.0.1:7100 --token 00 2>err || fail "no token"
grep -q 'no token' err || fail "no word about the token: $(cat err)"
waits other 1
tr '0123456789abcdef' '123456789abcdef0' <token >false
! blanket migrate vm --to 127.0.0.1:7100 --token-file false 2>err || fail "another token"
grep -q 'not the one that the token is of' err || fail "no word about it: $(cat err)"
(head -c 64 token; tail -c 65 false) >false2
! blanket migrate vm --to 127.0.0.1:7100 --token-file false2 2>err || fail "another secret"
counted 2
blanket kill other || fail "it waits on"
# refused WHY: by a dry run, after which the destination waits on, and by a move, after which not.
refused() {
    ! blanket migrate vm --to 127.0.0.1:7100 --token-file token --dry-run 2>err || fail "$1: it can move"
    grep -q -- "$1" err || fail "no word about $1: $(cat err)"
    ! blanket migrate vm --to 127.0.0.1:7100 --token-file token 2>err || fail "$1: it moves"
    grep -q -- "$1" err || fail "no word about $1: $(cat err)"
    until_true "$1: $name waits on" '! blanket stats $name >/dev/null 2>&1'
}
vm="--memory 128M --cpus 2" waits small 1
refused 'give --cpus, --memory'
net() { echo "--net tap=vm$1,mac=02:00:00:00:77:03"; }
waits stranger 1
refused mac=02:00:00:00:77:02
net() { echo "--net tap=vm$1,mac=02:00:00:00:77:02"; }
for other in '' ,base=md5:0; do
    on=$other
    waits stranger 1
    refused 'give both the same base='
done
on=,base=md5:$base
counted 2

move=0
for host in $HOSTS; do
    move=$((move + 1))
    next=$host-$move
    waits $next $((move % 2)) --host $host
    blanket migrate $now --to 127.0.0.1:7100 --token-file token --dry-run >said || fail "move $move: it cannot move"
    is "$now can move to 127.0.0.1:7100" "$(cat said)" "a dry run"
    before=$(last)
    # One, or two beside the first one.
    streams=$((1 + move % 2))
    blanket migrate $now --to 127.0.0.1:7100 --token-file token --streams $streams --json >moved 2>err ||
        fail "move $move: $(cat err); $(cat $next.log)"
    tr -d ' \n' <moved
    echo
    grep -q '"stage": "moved"' moved || fail "it has not moved"
    bytes=$(sed -n 's/.*"bytes": \([0-9]*\).*/\1/p' moved)
    [ "$bytes" -lt 64000000 ] || fail "the base was sent: $bytes bytes"
    found=$(sed -n 's/.*"found": \([0-9]*\).*/\1/p' moved)
    [ "$found" -ge 3500 ] || fail "of 4096 pages of the base $found were found"
    until ! blanket stats $now >/dev/null 2>&1; do sleep 0.1; done
    now=$next
    logs="$logs $next.log"
    counted 3
    first=$(tr -d '\r' <$now.log | sed -n 's/^COUNT //p' | head -n 1)
    [ "$first" -gt "$before" ] || fail "it counts $first after $before"
    [ "$(identity)" = "$whose" ] || fail "it is another one: $(identity), not $whose"
    blanket audit $now || fail "audit of $now"
    echo "ok: $now counts from $first"
done
tells $now end
until ! blanket stats $now >/dev/null 2>&1; do sleep 0.2; done
tr -d '\r' <$now.log | grep -qx 'GUEST-EXIT 0' || fail "it did not end well"
! grep -h WRONG *.log || fail "it computes wrong"
blanket disk info $now.qcow2 >/dev/null || fail "its qcow2 image is none"
cat $logs | tr -d '\r' | sed -n 's/^COUNT //p' >counted
seq $(tail -n 1 stream | sed 's/LINE //') >all
sort -n counted | cmp - all || fail "numbers are missing, or come twice"
sed 's/^/LINE /' all | cmp - stream || fail "the connection broke: $(tail -n 1 stream)"
# The raw image; the guest has read the other one back.
for n in $(cat all); do
    block=$(dd if=$now.raw bs=512 skip=$((n * 37)) count=1 2>/dev/null)
    [ "$block" = "$(printf '%-512s' "BLOCK $n")" ] || fail "block $n is $block"
done
echo "MIGRATE-OK"
