# Snapshots by the user's commands: of a VM that counts, writes to its disk and serves a page by a published port, while it
# does. A copy goes on beside it with an address of its own; then everything of the VM is removed, and it goes on from the
# snapshot on the other node, inside KVM. It comes back before all of its memory is there. The snapshot is
# carried in a file; one with a flipped byte is refused. When it has ended, a copy of its disks boots beside it, and on the
# other node it boots itself from a snapshot of them.

two_nodes a b
supercloud net create demo --subnet 10.5.0.0/16 || fail "no network"
blanket disk create --format raw --size 8M base.raw >/dev/null || fail "no image"
printf BASE | dd of=base.raw conv=notrunc 2>/dev/null
supercloud image add base.raw >/dev/null || fail "no base image"

printf '#cloud-config\n# told once\n' >user-data
cat >web.sh <<'V'
until [ -b /dev/xvda ]; do sleep 0.1; done
while :; do echo "the page of web" | nc -l -p 80; done &
# A network that is plugged in.
mac=$(cat /sys/class/net/eth0/address)
while :; do
    new=$(cat /sys/class/net/eth0/address 2>/dev/null)
    if [ -n "$new" ] && [ "$new" != "$mac" ]; then
        mac=$new
        ip link set eth0 up
        lease
        ping -c 1 -W 20 web >/dev/null && echo PINGED
    fi
    sleep 0.5
done &
# What another life has left on its disk.
kept=0
while [ "$(dd if=/dev/xvda bs=512 skip=$(((kept + 1) * 7)) count=1 2>/dev/null | head -c 6)" = "BLOCK " ]; do kept=$((kept + 1)); done
echo "KEPT $kept"
n=0
until [ -e /tmp/end ]; do
    n=$((n + 1))
    printf '%-512s' "BLOCK $n" | dd of=/dev/xvda bs=512 seek=$((n * 7)) conv=notrunc,fsync 2>/dev/null || echo WRONG disk
    echo "COUNT $n"
    sleep 1
done
echo 3 >/proc/sys/vm/drop_caches
i=0
while [ $i -lt $n ]; do
    i=$((i + 1))
    block=$(dd if=/dev/xvda bs=512 skip=$((i * 7)) count=1 2>/dev/null)
    [ "$block" = "$(printf '%-512s' "BLOCK $i")" ] || echo "WRONG block $i: $block"
done
grep -q 'told once' /dev/xvdb || echo "WRONG seed"
[ "$(dd if=/dev/xvda bs=512 count=1 2>/dev/null | head -c 4)" = BASE ] || echo "WRONG base"
V
{ cat /tmp/lease.sh; echo "$hears"; cat web.sh; } >script
lab-initrd script >web.img
logs() { supercloud vm logs $1 | tr -d '\r'; }
last() { logs $1 | sed -n 's/^COUNT //p' | tail -n 1; }
counted() {
    from=$(last $1)
    until_true "$1 counts no further than ${from:-nothing} ($2)" "[ \"\$(last $1)\" -ge $((${from:-0} + 3)) ] 2>/dev/null"
}
page() { until nc 10.77.0.2 8080 </dev/null 2>/dev/null | grep .; do sleep 0.1; done; }
supercloud vm run base --name web --net demo --publish 8080:80 --kernel /guest/vmlinuz --initrd web.img --memory 128M --cpus 2 \
    --cloud-init user-data --cmdline "console=hvc0 quiet panic=-1" || fail "it does not start"
until_true "it has no address" 'logs web | grep -q "^LEASE web"'
counted web "at first"
supercloud vm snapshot web --as one || fail "no snapshot"
counted web "after the snapshot"
logs web >past

# ---- a copy beside it ----
supercloud vm clone web --name copy || fail "no copy"
until_true "the copy has no address of its own: $(logs copy)" 'logs copy | grep -q "^LEASE copy"'
address() { logs $1 | sed -n "s/^LEASE $1 \([0-9.]*\).*/\1/p" | tail -n 1; }
[ "$(address copy)" != "$(address web)" ] || fail "both have $(address web)"
until_true "the copy does not reach the other one: $(logs copy)" 'logs copy | grep -q "^PINGED"'
supercloud net list
counted copy "the copy"
counted web "beside the copy"
is "the page of web" "$(page)" "the page, beside the copy"
say "web has $(address web), its copy $(address copy), and both count"

# ---- everything of it is gone, and it goes on at the other node ----
supercloud vm restore one 2>said && fail "it is there twice"
is 4 $? "one that is there"
for vm in web copy; do
    supercloud vm stop $vm --now >/dev/null && supercloud vm rm $vm || fail "$vm cannot be removed"
done
is "" "$(supercloud vm list | sed 1d)" "all are gone"
supercloud --node b vm restore one --lazy || fail "it does not go on at b: $(other cat b.log)"
until_true "it does not count there" 'logs web | grep -q ^COUNT'
next=$(logs web | sed -n 's/^COUNT //p' | head -n 1)
grep -qx "COUNT $((next - 1))" past || fail "it goes on at $next: $(tail -n 3 past)"
counted web "on b"
other 'blanket ps' | grep -q ' kvm ' || fail "it is not inside KVM"
is "the page of web" "$(page)" "the page, from b"
until_true "its memory does not come" 'other "blanket migrate web --status --json" >pull && grep -q "\"left\": 0" pull'
is "web b running" "$(supercloud vm list | awk '$1 == "web" { print $1, $2, $3 }')" "where it is, with its memory"
say "web goes on from the snapshot on b, at $next; its memory came after it: $(tr -d ' \n' <pull)"

# ---- back, and its memory follows ----
supercloud vm migrate web --to a --post-copy now >moved 2>&1 || fail "it does not come back: $(cat moved)"
tail -n 1 moved
grep -q 'its memory followed it' moved || fail "its memory came before it: $(cat moved)"
counted web "back on a"
is "the page of web" "$(page)" "the page, back on a"

# ---- in a file ----
supercloud vm export one one.tar.zst || fail "not exported"
size=$(stat -c %s one.tar.zst)
cp one.tar.zst flipped.tar.zst
at=$((size / 2))
byte=$(dd if=flipped.tar.zst bs=1 skip=$at count=1 2>/dev/null | od -An -tu1 | tr -d ' ')
printf "\\$(printf %o $((byte ^ 1)))" | dd of=flipped.tar.zst bs=1 seek=$at conv=notrunc 2>/dev/null
! cmp -s one.tar.zst flipped.tar.zst || fail "no byte is flipped"
supercloud vm import "$PWD/flipped.tar.zst" --as again 2>said && fail "a flipped byte"
is 2 $? "a flipped byte"
supercloud vm import one.tar.zst --as again || fail "not imported"
supercloud snapshot list
supercloud image rm base 2>said && fail "a base that is needed"
supercloud snapshot rm one && supercloud snapshot rm again || fail "they cannot be removed"
say "the snapshot is a file of $((size >> 10)) KiB"

echo end | supercloud vm console web >/dev/null 2>&1 &
until_true "it does not end" 'supercloud vm list | grep -q "^web .*ended"'
logs web | grep -qx 'GUEST-EXIT 0' || fail "it did not end well: $(logs web)"
! logs web | grep WRONG || fail "it computes wrong"

# ---- it does not run: its disks ----
wrote=$(last web)
supercloud vm snapshot web --as rest | grep 'it is stopped' || fail "no snapshot of one that does not run"
supercloud snapshot list
boots() {
    until_true "$1 does not boot: $(logs $1 | tail)" "logs $1 | grep -q '^LEASE $1'"
    until_true "$1 does not look at its disk" "logs $1 | grep -q '^KEPT'"
    is "KEPT $wrote" "$(logs $1 | grep '^KEPT')" "what is on the disk of $1"
    counted $1 "$2"
}
supercloud vm clone web --name cold || fail "no copy of one that does not run"
boots cold "a copy of disks"
is "web ended" "$(supercloud vm list | awk '$1 == "web" { print $1, $3 }')" "the one that was copied"
supercloud vm stop cold --now >/dev/null && supercloud vm rm cold && supercloud vm rm web || fail "they cannot be removed"
supercloud --node b vm restore rest --lazy 2>said && fail "lazily, without memory"
is 2 $? "lazily, without memory"
supercloud --node b vm restore rest || fail "it does not boot at b: $(other cat b.log)"
boots web "from its disks"
is "the page of web" "$(page)" "the page, from its disks"
! logs web | grep WRONG || fail "it computes wrong"
say "web boots on b from a snapshot of its disks, with all of $wrote blocks"
supercloud vm stop web --now >/dev/null && supercloud snapshot rm rest || fail "they cannot be removed"
supercloud vm rm web && supercloud net rm demo && supercloud image rm base || fail "something cannot be removed"
is 0 "$(ls /var/lib/supercloud/images | wc -l)" "images that are left"
kill $agent
wait $agent
echo NODES-SNAPSHOT-OK
