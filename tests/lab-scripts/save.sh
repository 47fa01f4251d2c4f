# A VM that computes is saved, and goes on from the file: on the same host, on the other one
# (KVM and the module), and here while its copy is kept. No number that it counts is missing,
# and nothing that it computes is wrong.
cd "$(mktemp -d)" || exit 1
fail() {
    echo "FAILED: $*"
    for log in *.log; do
        echo "-- $log"
        tail -n 40 "$log" | tr -d '\r'
    done
    exit 1
}

cat >script <<'S'
check() {
    while [ ! -e /tmp/stop ]; do
        dd if=/dev/urandom bs=64k count=8 2>/dev/null | tee /tmp/$1 | md5sum >/tmp/$1.sum
        md5sum </tmp/$1 | cmp - /tmp/$1.sum || { echo WRONG; exit 1; }
    done
}
check a & a=$!
check b & b=$!
n=0
until [ $n = 150 ]; do
    n=$((n + 1))
    echo "COUNT $n"
    sleep 0.1
done
touch /tmp/stop
wait $a && wait $b
S
lab-initrd script >initrd

# start NAME OPTIONS...: in the background, with the console in NAME.log.
start() {
    log=$1
    shift
    blanket run --name vm --console file:$log.log --detach "$@" >/dev/null || fail "$log does not start"
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
counted 5
blanket kill vm
until ! blanket stats vm >/dev/null 2>&1; do sleep 0.2; done
# What it counted since was another future.
mv first.log first
tr -d '\r' <first | grep '^COUNT' >past
blanket run --restore copy.vm --console file:second.log --name vm --detach >/dev/null || fail "it does not go on"
until grep -q '^COUNT' second.log; do blanket stats vm >/dev/null 2>&1 || fail "it does not go on"; sleep 0.2; done
next=$(tr -d '\r' <second.log | grep -m 1 '^COUNT' | sed 's/COUNT //')
grep -qx "COUNT $((next - 1))" past || fail "it goes on at $next"
[ "$(blanket ps --json | grep '"uuid"')" = "$uuid" ] || fail "it is another one"
[ "$(blanket ps --json | grep '"generation_id"')" != "$generation" ] || fail "its generation is the old one"
counted 5

hosts=${HOSTS:-module}
for host in $hosts; do
    blanket save vm $host.vm || fail "not saved for $host"
    ! blanket stats vm 2>/dev/null || fail "it runs on"
    before=$(last)
    start on-$host --restore $host.vm --host $host
    counted 5
    first=$(tr -d '\r' <on-$host.log | grep -m 1 '^COUNT' | sed 's/COUNT //')
    [ "$first" = $((before + 1)) ] || fail "it counts $first after $before"
    blanket ps --json | grep -q "\"host\": \"$host\"" || fail "it is not on $host"
    blanket audit vm || fail "audit on $host"
    echo "ok: on $host from $first"
done

# What is no saved VM, or is damaged, is refused in words.
head -c 1000000 copy.vm >short.vm
! blanket run --restore short.vm --name two 2>err || fail "half a file"
grep -q 'ends in the middle' err || fail "no word about half a file: $(cat err)"
cp copy.vm flipped.vm
printf 'X' | dd of=flipped.vm bs=1 seek=500000 conv=notrunc 2>/dev/null
! blanket run --restore flipped.vm --name two 2>err || fail "a flipped byte"
grep -q 'damaged' err || fail "no word about a flipped byte: $(cat err)"
! blanket run --restore script --name two 2>err || fail "a script"
grep -q 'no saved VM' err || fail "no word about it: $(cat err)"
! blanket save vm copy.vm 2>err || fail "over another file"
grep -q 'is there already' err || fail "no word about it: $(cat err)"
! blanket run --restore copy.vm --memory 1G --name two 2>err || fail "another size"

until tr -d '\r' <"$(ls -t on-*.log | head -n 1)" | grep -q '^GUEST-EXIT'; do
    blanket stats vm >/dev/null 2>&1 || break
    sleep 0.5
done
tr -d '\r' <"$(ls -t on-*.log | head -n 1)" | grep -qx 'GUEST-EXIT 0' || fail "it did not end well"
! grep -h WRONG *.log || fail "it computes wrong"
echo SAVE-OK
