# A whole Debian with PostgreSQL under pgbench moves between two instances, one with virtio devices and the module, one with NVMe,
# e1000e and KVM, MOVES times. A third instance has an open ssh session, a client that is told of each row that is written, and
# another that hears a number after the other over TCP. No row that was acknowledged is gone, no session breaks, no number is
# missing. It stands on the same image at both.
bridged vm1
# The link with the third one.
brctl addif br0 eth1 && ip link set eth1 up || fail "no third place"
put key 3
# Shells for what goes on there.
in_node 3 7001 'chmod 600 key; for port in 7011 7012 7013; do nc -l -p $port -e /bin/sh >/dev/null 2>&1 & done'
# The image is the only disk of its kind there.
other 'ln -s vda /dev/vdb'

MAC=02:00:00:00:77:50
sed -i 's|addresses: .*|addresses: [10.77.0.50/24]|' network
in_vm() { ssh $OPTIONS user@10.77.0.50 "$@"; }
# by_ssh COMMAND: how the third one does it in the VM.
by_ssh() { echo "ssh $(echo $OPTIONS) user@10.77.0.50 \"\$(echo $(echo "$1" | base64 -w 0) | base64 -d)\""; }
base=backing=/dev,base=debian
blanket disk create --backing /dev/vdb --backing-format raw disk0.qcow2 || fail "no overlay"
blanket run disk0.qcow2,$base --cmdline systemd.default_timeout_start_sec=1500 --name deb --memory 640M --cpus 2 \
    --net tap=vm1,mac=$MAC --cloud-init user-data,network=network --console file:deb.log --detach >/dev/null || fail "deb does not start"
login
# Its seed has done its work, and does not move.
seed=$(blanket disk list deb | awk '/cloud-init seed/ { print $1 }')
blanket disk detach deb "$seed" || fail "its seed stays"
PSQL='cd / && sudo -u postgres stdbuf -oL psql -Atq -v ON_ERROR_STOP=1'
in_vm 'for n in $(seq 600); do pg_isready -q && exit; sleep 1; done; exit 1' || fail "no database"
echo 'create table acknowledged (id serial primary key);' | in_vm "$PSQL" || fail "no table"
in_vm 'cd / && sudo -u postgres pgbench -i -q -s 1 postgres' || fail "no tables for pgbench"
in_vm 'cd / && sudo -u postgres sh -c "pgbench -c 2 -T 36000 -P 5 postgres >/tmp/pgbench.log 2>&1 &"'

# ---- who is connected meanwhile ----
in_node 3 7011 "$(by_ssh 'n=0; while :; do n=$((n + 1)); echo SESSION $n; sleep 1; done') 2>session.log" >session &
session=$!
in_node 3 7012 "yes 'insert into acknowledged default values returning id; select pg_sleep(0.2);' | $(by_ssh "$PSQL") 2>ids.log" >ids &
in_vm 'python3 -c "
import socket, time
s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind((\"\", 7000)); s.listen(1); c = s.accept()[0]
n = 0
while True:
    n += 1; c.sendall(b\"NUMBER %d %f %f\n\" % (n, time.time(), time.monotonic())); time.sleep(0.1)
"' 2>numbers.log &
in_vm 'until ss -ltn | grep -q :7000; do sleep 1; done'
# Each with the time at which it was heard, and what the guest took it for.
in_node 3 7013 'tail -f /dev/null | nc 10.77.0.50 7000 2>numbers.log |
    while read -r line; do read -r up _ </proc/uptime; echo "$line $up"; done' >numbers &
last() { sed -n "s/^$2 \([0-9]*\).*/\1/p" $1 | tail -n 1; }
goes_on() {
    for what in 'session SESSION' 'numbers NUMBER' 'ids '; do
        set -- $what
        from=$(if [ $1 = ids ]; then grep -c . ids; else last $1 $2; fi)
        tries=0
        until [ "$(if [ $1 = ids ]; then grep -c . ids; else last $1 $2; fi)" -ge $((${from:-0} + 3)) ] 2>/dev/null; do
            tries=$((tries + 1))
            [ $tries -lt 600 ] || fail "$1 goes no further than ${from:-nothing}: $(in_node 3 7001 "cat $1.log")"
            kill -0 $session 2>/dev/null || fail "the session has ended: $(in_node 3 7001 'cat session.log')"
            sleep 0.2
        done
    done
}
goes_on
# What the least delayed of the last numbers says of the guest's clock: how far it is behind the third one's, and its time of day
# behind that; s. It waits until there are enough.
clock() {
    enough=$(($(last numbers NUMBER) + 25))
    until [ "$(last numbers NUMBER)" -ge $enough ]; do sleep 0.2; done
    grep '^NUMBER .* .* .* .' numbers | tail -n 25 | head -n 24 | awk '{ behind = $5 - $4; if (NR == 1 || behind < least) { least = behind; day = $3 - $4 } }
        END { printf "%.6f %.6f\n", least, day }'
}

# ---- there and back ----
# on NODE COMMAND
on() { n=$1; shift; if [ $n = 1 ]; then eval "$*"; else other "$*"; fi; }
here=1
for move in $(seq ${MOVES:-10}); do
    to=$((3 - here))
    before=$(clock)
    on $to "rm -f disk$move.qcow2 token; blanket disk create --backing /dev/vdb --backing-format raw disk$move.qcow2 >said 2>&1 &&
        blanket run --incoming 10.77.0.$to:7100 --token-file token --name deb --memory 640M --cpus 2 \
        --disk disk$move.qcow2,$base --net tap=vm1,mac=$MAC --console file:deb$move.log --detach >said 2>&1; cat said; cat token" >there
    token=$(grep -E '^[0-9a-f]{64,}' there | tail -n 1)
    [ -n "$token" ] || fail "it is not waited for: $(cat there)"
    on $here "blanket migrate deb --to 10.77.0.$to:7100 --token $token --json" >moved 2>&1
    grep -q '"stage": "moved"' moved || fail "move $move: $(cat moved)"
    goes_on
    after=$(clock)
    echo "$before $after" | awk -v move=$move -v to=$to -v down="$(sed -n 's/.*"downtime_ms": \([0-9]*\).*/\1/p' moved)" \
        -v bytes="$(sed -n 's/.*"bytes": \([0-9]*\).*/\1/p' moved)" -v found="$(sed -n 's/.*"found": \([0-9]*\).*/\1/p' moved)" '{
        printf "move %d, to %d: %d MiB, and %d MiB were in the base; it stood still for %d ms; its clock stepped by %.1f ms, its time of day against that by %.3f ms\n",
            move, to, bytes / 1048576, found / 256, down, ($1 - $3) * 1000, ($4 - $2) * 1000 }'
    # An emulator's scheduling is in it; clocks of the instances that differ must not be.
    echo "$before $after" | awk '{ step = ($1 - $3) * 1000; exit step < -100 || step > 100 }' || fail "its clock stepped"
    here=$to
done

# ---- nothing is missing ----
# Of those that are whole: it goes on.
head -n "$(wc -l <ids)" ids | grep . >all
wanted=$(tr '\n' ',' <all)
gone=$(in_vm "$PSQL" <<Q
select count(*) from unnest(array[${wanted%,}]) want(id) where not exists (select from acknowledged a where a.id = want.id);
Q
) || fail "no answer"
[ "$gone" = 0 ] || fail "$gone acknowledged rows are gone"
sed -n 's/^NUMBER \([0-9]*\).*/\1/p' numbers | head -n -1 >heard
seq "$(tail -n 1 heard)" | cmp - heard || fail "numbers are missing"
sed -n 's/^SESSION //p' session | head -n -1 >heard
seq "$(tail -n 1 heard)" | cmp - heard || fail "the session missed something"
in_vm 'tail -n 2 /tmp/pgbench.log; ! grep -i error /tmp/pgbench.log' || fail "pgbench failed"
echo "ok: $(wc -l <all) rows acknowledged and there, $(last numbers NUMBER) numbers, one session of $(last session SESSION) s"
on $here 'blanket kill deb'
echo DEBIAN-OK
