# A VM that computes is saved, and goes on from the file: on the same host, on the other one
# (KVM and the module), and here while its copy is kept. No number that it counts is missing,
# and nothing that it computes is wrong.
tunctl -t vm0 >/dev/null || fail "no tap"
ip addr add 192.168.77.1/24 dev vm0
ip link set vm0 up
# What the VM sends on one connection through all of it. Its input stays open, or the other
# end would take it for the end.
tail -f /dev/null | nc -l -p 7000 >stream &
blanket disk create --format raw --size 1M disk.raw >/dev/null || fail "no image"

echo "$sums" >script
echo "$hears" >>script
cat >>script <<'S'
until [ -b /dev/xvda ] && [ -e /sys/class/net/eth0 ]; do sleep 0.1; done
ip addr add 192.168.77.2/24 dev eth0
ip link set eth0 up
check a & a=$!
check b & b=$!
mkfifo /tmp/out
n=0
connected=
until [ -e /tmp/end ]; do
    n=$((n + 1))
    if [ -z "$connected" ] && [ -e /tmp/connect ]; then
        connected=yes
        nc 192.168.77.1 7000 </tmp/out &
        exec 3>/tmp/out
    fi
    printf '%-512s' "BLOCK $n" | dd of=/dev/xvda bs=512 seek=$n conv=notrunc,fsync 2>/dev/null || echo WRONG disk
    [ -z "$connected" ] || echo "LINE $n" >&3
    echo "COUNT $n"
    sleep 0.1
done
exec 3>&-
touch /tmp/stop
wait $a && wait $b
S
lab-initrd script >initrd

# start NAME OPTIONS...: in the background, with the console in NAME.log.
start() {
    log=$1
    shift
    blanket run --name vm --console file:$log.log --detach --disk disk.raw --net tap=vm0 "$@" >/dev/null ||
        fail "$log does not start"
}
last() { grep -h '^COUNT' *.log | tr -d '\r' | sed 's/COUNT //' | sort -n | tail -n 1; }
# Until it has counted on by this much.
counted() {
    to=$(($(last) + $1))
    until [ "$(last)" -ge $to ]; do
        blanket stats vm >/dev/null 2>&1 || fail "the VM is gone"
        sleep 0.2
    done
}

: >none.log
start first --kernel /guest/vmlinuz --initrd initrd --memory 256M --cpus 2 --cmdline "console=hvc0 panic=-1"
until grep -q '^COUNT' first.log; do blanket stats vm >/dev/null 2>&1 || fail "it does not boot"; sleep 0.2; done
counted 5
uuid=$(blanket ps --json | grep '"uuid"')
generation=$(blanket ps --json | grep '"generation_id"')

blanket save vm copy.vm --keep-running || fail "not saved"
blanket save vm whole.vm --disks --keep-running || fail "not saved with its disk"
[ "$(stat -c %a copy.vm)" = 600 ] || fail "others may read it: $(stat -c %a copy.vm)"
[ ! -e copy.vm.part ] || fail "its part is left"
counted 5
blanket kill vm
until ! blanket stats vm >/dev/null 2>&1; do sleep 0.2; done
# What it counted since was another future.
mv first.log first
tr -d '\r' <first | grep '^COUNT' >past
! blanket run --restore copy.vm --net tap=vm0 --name vm 2>err || fail "without its disk"
grep -q 'disk 51712 (--disk)' err || fail "no word about its disk: $(cat err)"
# With its disk, and as another VM.
new=11111111-2222-4333-8444-555555555555
blanket disk create --format raw --size 1M whole.raw >/dev/null || fail "no image"
blanket run --name two --console file:two.out --detach --disk whole.raw --net tap=vm0 \
    --restore whole.vm --uuid $new >/dev/null || fail "the copy with a disk does not start"
until [ "$(grep -c '^COUNT' two.out)" -ge 5 ]; do blanket stats two >/dev/null 2>&1 || fail "the copy is gone"; sleep 0.2; done
blanket ps --json | grep -q "\"uuid\": \"$new\"" || fail "it is not another one: $(blanket ps --json)"
blanket kill two
until ! blanket stats two >/dev/null 2>&1; do sleep 0.2; done
next=$(tr -d '\r' <two.out | grep -m 1 '^COUNT' | sed 's/COUNT //')
grep -qx "COUNT $((next - 1))" past || fail "the copy with a disk goes on at $next"
n=1
until [ $n -ge "$(tr -d '\r' <two.out | grep '^COUNT' | tail -n 1 | sed 's/COUNT //')" ]; do
    block=$(dd if=whole.raw bs=512 skip=$n count=1 2>/dev/null)
    [ "$block" = "$(printf '%-512s' "BLOCK $n")" ] || fail "block $n of the copy is $block"
    n=$((n + 1))
done
! grep WRONG two.out || fail "the copy computes wrong"
start second --restore copy.vm
until grep -q '^COUNT' second.log; do blanket stats vm >/dev/null 2>&1 || fail "it does not go on"; sleep 0.2; done
next=$(tr -d '\r' <second.log | grep -m 1 '^COUNT' | sed 's/COUNT //')
grep -qx "COUNT $((next - 1))" past || fail "it goes on at $next"
[ "$(blanket ps --json | grep '"uuid"')" = "$uuid" ] || fail "it is another one"
[ "$(blanket ps --json | grep '"generation_id"')" != "$generation" ] || fail "its generation is the old one"
counted 5

# Not before the copies, with which a connection would go back in time.
tells vm connect
until_true "it does not connect" 'grep -q LINE stream'
hosts=${HOSTS:-module}
moves=0
for host in $hosts; do
    moves=$((moves + 1))
    blanket save vm $moves.vm || fail "not saved for $host"
    ! blanket stats vm 2>/dev/null || fail "it runs on"
    before=$(last)
    # All of the file is its memory until that has come; its name it may lose.
    start on-$host-$moves --restore $moves.vm --lazy --host $host
    rm $moves.vm
    counted 5
    until_true "its memory does not come" 'blanket migrate vm --status --json >pull && grep -q "\"left\": 0" pull'
    tr -d ' \n' <pull
    echo
    first=$(tr -d '\r' <on-$host-$moves.log | grep -m 1 '^COUNT' | sed 's/COUNT //')
    [ "$first" = $((before + 1)) ] || fail "it counts $first after $before"
    blanket ps --json | grep -q "\"host\": \"$host\"" || fail "it is not on $host"
    blanket audit vm || fail "audit on $host"
    echo "ok: on $host from $first"
done

# What is no saved VM, or is damaged, is refused in words.
blanket disk create --format raw --size 1M spare.raw >/dev/null || fail "no image"
tunctl -t vm1 >/dev/null || fail "no tap"
spare="--name two --disk spare.raw --net tap=vm1"
head -c 1000000 copy.vm >short.vm
! blanket run --restore short.vm $spare 2>err || fail "half a file"
grep -q 'ends in the middle' err || fail "no word about half a file: $(cat err)"
cp copy.vm flipped.vm
printf 'X' | dd of=flipped.vm bs=1 seek=500000 conv=notrunc 2>/dev/null
! blanket run --restore flipped.vm $spare 2>err || fail "a flipped byte"
grep -q 'damaged' err || fail "no word about a flipped byte: $(cat err)"
! blanket run --restore flipped.vm --lazy $spare 2>err || fail "a flipped byte that would come later"
grep -q 'damaged' err || fail "no word about a flipped byte: $(cat err)"
! blanket run --restore script $spare 2>err || fail "a script"
grep -q 'no saved VM' err || fail "no word about it: $(cat err)"
! blanket save vm copy.vm 2>err || fail "over another file"
grep -q 'is there already' err || fail "no word about it: $(cat err)"
# What is refused leaves nothing.
mkdir full
mount -t tmpfs -o size=1M none full
! blanket save vm full/vm --keep-running 2>err || fail "saved where there is no space"
grep -q 'No space' err || fail "no word about the space: $(cat err)"
[ -z "$(ls full)" ] || fail "something is left: $(ls full)"
umount full
blanket stats vm >/dev/null || fail "the VM is gone"
! blanket run --restore copy.vm --memory 1G $spare 2>err || fail "another size"

on=on-$host-$moves.log
tells vm end
until_true "it does not end" '! blanket stats vm >/dev/null 2>&1'
tr -d '\r' <$on | grep -qx 'GUEST-EXIT 0' || fail "it did not end well"
! grep -h WRONG *.log || fail "it computes wrong"
n=1
while [ $n -le "$(last)" ]; do
    block=$(dd if=disk.raw bs=512 skip=$n count=1 2>/dev/null)
    [ "$block" = "$(printf '%-512s' "BLOCK $n")" ] || fail "block $n is $block"
    n=$((n + 1))
done
seq "$(head -n 1 stream | sed 's/LINE //')" "$(last)" | sed 's/^/LINE /' | cmp - stream ||
    fail "the connection broke: $(tail -n 1 stream)"
echo SAVE-OK
