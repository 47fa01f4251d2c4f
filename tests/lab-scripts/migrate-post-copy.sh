# A VM whose programs write memory without end moves from one process to the next before its memory
# does, which follows it: MOVES of them, each on a host of HOSTS (module, kvm). What it computes is
# right, no number is missing, and both sides say how far it is.
echo "$sums" >script
echo "$hears" >>script
cat >>script <<'S'
mount -t tmpfs -o size=20M held /mnt
dd if=/dev/urandom of=/mnt/held bs=1M count=8 2>/dev/null
want=$(md5sum </mnt/held)
check a & a=$!
# Most of what it has it reads only, and finds wrong if a page is another one's.
while [ ! -e /tmp/stop ]; do
    [ "$(md5sum </mnt/held)" = "$want" ] || { echo WRONG held; exit 1; }
    echo HELD
done &
n=0
until [ -e /tmp/end ]; do
    n=$((n + 1))
    printf '%-512s' "BLOCK $n" | dd of=/dev/xvda bs=512 seek=$((n * 37)) conv=notrunc,fsync 2>/dev/null || echo WRONG disk
    echo "COUNT $n"
    sleep 1
done
touch /tmp/stop
wait $a
S
lab-initrd script >initrd
vm="--memory 128M --cpus 2"
image() {
    blanket disk create --format raw --size 8M $1.raw >/dev/null || fail "no image"
}
# A line may begin in one place and end in the next.
logs=vm.log
last() { cat $logs | tr -d '\r' | sed -n 's/^COUNT //p' | sort -n | tail -n 1; }
counted() {
    to=$(($(last) + $1))
    until [ "$(last)" -ge $to ]; do
        blanket stats $now >/dev/null 2>&1 || fail "$now is gone"
        ! grep -h WRONG *.log || fail "it computes wrong"
        sleep 0.2
    done
}
figure() { sed -n "s/.*\"$1\": \([0-9]*\).*/\1/p" moved; }

now=vm
image vm
blanket run --name vm --kernel /guest/vmlinuz --initrd initrd $vm --disk vm.raw --detach \
    --console file:vm.log --cmdline "console=hvc0 panic=-1" >/dev/null || fail "it does not start"
until grep -q '^HELD' vm.log; do blanket stats vm >/dev/null 2>&1 || fail "it does not boot"; sleep 0.2; done
counted 1
move=0
for host in $HOSTS; do
    move=$((move + 1))
    next=$host-$move
    image $next
    rm -f token
    blanket run --incoming 127.0.0.1:7100 --token-file token --name $next $vm --disk $next.raw --host $host \
        --detach --console file:$next.log >/dev/null || fail "$next does not wait"
    before=$(last)
    blanket migrate $now --to 127.0.0.1:7100 --token-file token --post-copy now --json >moved 2>err ||
        fail "move $move: $(cat err); $(cat $next.log)"
    tr -d ' \n' <moved
    echo
    grep -q '"stage": "moved"' moved || fail "it has not moved"
    [ "$(figure pull_ms)" -gt 0 ] || fail "nothing followed it: this tries nothing"
    [ "$(figure left)" = 0 ] || fail "pages are missing"
    until_true "$now is still there" '! blanket stats $now >/dev/null 2>&1'
    now=$next
    logs="$logs $next.log"
    counted 2
    first=$(tr -d '\r' <$now.log | sed -n 's/^COUNT //p' | head -n 1)
    [ "$first" -gt "$before" ] || fail "it counts $first after $before"
    blanket audit $now || fail "audit of $now"
    echo "ok: $now counts from $first"
done
held=$(grep -c HELD $now.log)
until_true "it does not read what it has" '[ $(grep -c HELD $now.log) -gt $held ]'
echo "ok: it reads what it has"
tells $now end
until_true "it does not end" '! blanket stats $now >/dev/null 2>&1'
tr -d '\r' <$now.log | grep -qx 'GUEST-EXIT 0' || fail "it did not end well"
! grep -h WRONG *.log || fail "it computes wrong"
cat $logs | tr -d '\r' | sed -n 's/^COUNT //p' >counted
seq "$(last)" >all
sort -n counted | cmp - all || fail "numbers are missing, or come twice"
for n in $(cat all); do
    block=$(dd if=$now.raw bs=512 skip=$((n * 37)) count=1 2>/dev/null)
    [ "$block" = "$(printf '%-512s' "BLOCK $n")" ] || fail "block $n is $block"
done
echo "POST-COPY-OK"
