# What a database in a VM has acknowledged is there after its VM was killed, each time.
# ROUNDS: how often.
blanket disk create --backing /dev/vdb --backing-format raw disk.qcow2 || fail "no overlay"
# SQL comes by standard input: what ssh is given as words, a shell of the VM reads once more.
PSQL='cd / && sudo -u postgres stdbuf -oL psql -Atq -v ON_ERROR_STOP=1'
sql() { in_vm "$PSQL"; }
ready() { in_vm 'for n in $(seq 600); do pg_isready -q && exit; sleep 1; done; exit 1' || fail "no database: $*"; }
boot disk.qcow2,backing=/dev
running
ready "at first"
echo 'create table acknowledged (id serial primary key, at timestamptz default now());' | sql || fail "no table"
in_vm 'cd / && sudo -u postgres pgbench -i -q -s 1 postgres && sudo -u postgres pgbench -c 2 -T 5 postgres' || fail "pgbench"
: >all
for round in $(seq 1 "${ROUNDS:-1}"); do
    # Each id comes back after its own commit.
    : >ids
    # shellcheck disable=SC2086
    yes 'insert into acknowledged default values returning id;' |
        exec ssh $OPTIONS user@192.168.77.2 "$PSQL" >ids 2>psql.log &
    client=$!
    until [ "$(wc -l <ids)" -ge $((20 + round * 7)) ]; do
        kill -0 $client 2>/dev/null || fail "round $round: no more rows come"
        sleep 0.1
    done
    vm=$(blanket ps | awk '$1 == "deb" { print $2 }')
    kill -9 "$vm" || fail "deb is not there"
    # ssh does not learn that nobody is there any more.
    kill $client
    wait
    # A line that is not whole is none.
    head -n "$(wc -l <ids)" ids >>all
    # What the old process had takes a moment to be free: its image, tap and port.
    tries=0
    until launch disk.qcow2,backing=/dev 2>said; do
        tries=$((tries + 1))
        [ $tries -lt 50 ] || fail "deb does not start again: $(cat said)"
        sleep 0.2
    done
    login
    ready "round $round"
    wanted=$(tr '\n' ',' <all)
    gone=$(sql <<Q
select count(*) from unnest(array[${wanted%,}]) want(id) where not exists (select from acknowledged a where a.id = want.id);
Q
    ) || fail "no answer in round $round"
    [ "$gone" = 0 ] || fail "round $round: $gone acknowledged rows are gone"
    echo "ok: round $round: $(wc -l <ids) acknowledged, $(wc -l <all) in all, none gone"
done
blanket stop deb --timeout 300 || fail "it does not power off"
echo DEBIAN-OK
