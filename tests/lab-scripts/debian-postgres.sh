# What a database in a VM has acknowledged is there after its VM was killed, each time.
# ROUNDS: how often.
blanket disk create --backing /dev/vdb --backing-format raw disk.qcow2 || fail "no overlay"
sql() { in_vm sudo -u postgres psql -Atq "$@"; }
boot disk.qcow2,backing=/dev
running
sql -c 'create table acknowledged (id serial primary key, at timestamptz default now())' || fail "no table"
in_vm 'sudo -u postgres pgbench -i -q -s 1 postgres && sudo -u postgres pgbench -c 2 -T 5 postgres' || fail "pgbench"
touch ids
for round in $(seq 1 "${ROUNDS:-1}"); do
    # Each id comes back after its own commit.
    (yes 'insert into acknowledged default values returning id;' | sql >ids 2>/dev/null) &
    until [ "$(wc -l <ids)" -ge $((20 + round * 7)) ]; do sleep 0.1; done
    kill -9 "$(blanket ps --json | sed -n 's/.*"pid": \([0-9]*\).*/\1/p')"
    wait
    last=$(grep -E '^[0-9]+$' ids | tail -n 1)
    boot disk.qcow2,backing=/dev
    there=$(sql -c "select count(*) from acknowledged where id <= $last") || fail "no database after round $round"
    wanted=$(grep -E '^[0-9]+$' ids | tr '\n' ',')
    gone=$(sql -c "select count(*) from unnest(array[${wanted%,}]) want(id) \
        where not exists (select from acknowledged a where a.id = want.id)")
    [ "$gone" = 0 ] || fail "round $round: $gone acknowledged rows are gone"
    echo "ok: round $round: $(wc -l <ids) acknowledged, $there there, none gone"
    : >ids
done
blanket stop deb --timeout 300 || fail "it does not power off"
echo DEBIAN-OK
