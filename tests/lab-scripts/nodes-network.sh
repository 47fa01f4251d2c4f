# Two nodes and a virtual network by the user's commands: two VMs, one on each node, find each other by name; one
# has a published port; it moves there and back by `supercloud vm migrate`, with a connection to the other VM and one
# from outside of the network through the first node.

two_nodes a b

supercloud net create demo --subnet 10.5.0.0/16 || fail "no network"
other supercloud net create demo >said 2>&1
grep -q 'demo has 10.5.0.0/16' said || fail "the other node makes another one: $(cat said)"
supercloud net create other --subnet 10.5.7.0/24 2>said && fail "two networks overlap"
is 2 $? "a network that overlaps"

cat >web.sh <<'V'
ping -c 1 -W 20 db && echo PINGED
while :; do echo "the page of web" | nc -l -p 80; done &
numbers IN | nc db 7000 &
numbers PUB | nc -l -p 81 &
while read -r word; do
    [ "$word" != end ] || break
done
touch /tmp/end
sleep 1
V
cat >db.sh <<'V'
nc -l -p 7000
V
cat /tmp/lease.sh web.sh >script
lab-initrd script >/root/web.img
cat /tmp/lease.sh db.sh >script
other "base64 -d >script <<'E'
$(base64 script)
E
lab-initrd script >db.img"
run() {
    supercloud --node $2 vm run --name $1 --net demo --kernel /guest/vmlinuz --initrd /root/$1.img --memory 128M \
        --host module --cmdline "console=hvc0 quiet panic=-1" $3 || fail "$1 does not start"
}
run db b
until_true "db has no address" 'supercloud vm logs db | grep -q LEASE'
run web a "--publish 8080:80 --publish 8081:81"
supercloud vm run --name twice --net demo --publish 8080:1 --kernel /guest/vmlinuz --memory 64M 2>said && fail "two have a port"
grep -q 'published port 8080/tcp is there twice' said || fail "no word about the port: $(cat said)"
supercloud net list
logs() { supercloud vm logs $1 | tr -d '\r'; }
until_true "web has no address" 'logs web | grep -q "^LEASE web"'
is "LEASE web 10.5.0.3/16 mtu 1370 via 10.5.0.1 dns 10.5.0.1 search demo.internal" "$(logs web | grep ^LEASE)" "what web got"
until_true "web does not find db" 'logs web | grep -q ^PINGED'
page() { until nc $1 8080 </dev/null 2>/dev/null | grep .; do sleep 0.1; done; }
is "the page of web" "$(page 10.77.0.2)" "the page, through b's port"
tail -f /dev/null | nc 10.77.0.1 8081 >pub &
last() { case $1 in IN) logs db ;; PUB) cat pub ;; esac | sed -n "s/^$1 \([0-9]*\)$/\1/p" | tail -n 1; }
counted() {
    for what in IN PUB; do
        from=$(last $what)
        until_true "$what counts no further than $(last $what) ($1)" "[ \$(last $what) -ge $((${from:-0} + 10)) ]"
    done
}
counted "before it moves"
for to in b a; do
    supercloud vm migrate web --to $to --streams 4 >moved 2>&1 || fail "web does not go to $to: $(cat moved)"
    tail -n 1 moved
    counted "on $to"
    until_true "the list has it elsewhere" "supercloud net list | grep -q 'web .* $to '"
    is "the page of web" "$(page 10.77.0.1)" "the page, while it is on $to"
    say "web is on $to, and its connections with it"
done
supercloud net rm demo 2>said && fail "a network with VMs is removed"
is 4 $? "a network with VMs"

echo end | supercloud vm console web >/dev/null 2>&1 &
until_true "web does not end" 'supercloud vm list | grep -q "^web .*ended"'
until_true "db does not end" 'supercloud vm list | grep -q "^db .*ended"'
for what in IN PUB; do
    case $what in IN) logs db ;; PUB) cat pub ;; esac | sed -n "s/^$what \([0-9]*\)$/\1/p" >numbers
    seq "$(last $what)" | cmp - numbers || fail "$what: numbers are missing, or come twice"
done
supercloud vm rm web && supercloud vm rm db || fail "they cannot be removed"
supercloud net rm demo || fail "the network cannot be removed"
until_true "something is left: $(ip link)" '! ip link | grep -q " scb"'
kill $agent
wait $agent
echo NODES-NETWORK-OK
