# Runs in an instance: a core that fails ends its VM only, with a report that names
# the place. The faults are made on purpose, by a kernel of ours in a VM that may
# (hidden option --inject); a VM beside it works all the time.
fail() { echo "FAILED: $*"; cat /tmp/out; exit 1; }
hostile() { blanket run --kernel /bin/hostile --memory 32M --console file:/tmp/console "$@" </dev/null; }

if [ "$BLANKET_HOST" = module ]; then
    hostile --inject --cmdline inject=1 >/tmp/out 2>&1
    [ $? = 1 ] || fail "the module lets anybody break its core"
    rmmod blanket && insmod /lab/blanket.ko inject=1 || exit 1
fi

hostile --cmdline inject=1 >/tmp/out 2>&1 || fail "a VM that may not break its core did not power off"
grep -q 'fault 1 gave -38' /tmp/console || fail "a VM that may not break its core could try"

cat >/tmp/script <<'X'
n=0
while [ $n -lt 300 ]; do /bin/true || exit 1; n=$((n + 1)); done
for round in 1 2 3; do
    dd if=/dev/zero bs=1M count=20 2>/dev/null | md5sum | grep -q 8f4e33f3dc3e414ff94e5fb6905cba8c || exit 1
done
X
guest /tmp/script --cpus 1 --name neighbour >/tmp/guest.log 2>&1 &
neighbour=$!

# core_fails KIND TEXT PLACE: the VM ends as a failure of the core, and the report says so.
core=$(blanket --version | sed -n 's/.*(core \([0-9a-f]*\))$/\1/p')
core_fails() {
    begun=$(date +%s)
    hostile --inject --name broken --cmdline "inject=$1" >/tmp/out 2>&1
    code=$?
    echo "== fault $1: ended with $code after $(($(date +%s) - begun)) s"
    report=/run/blanket/broken.crash
    [ $code = 7 ] || fail "fault $1 ended with $code"
    grep -q "the whole report is in $report" /tmp/out || fail "fault $1: no word of its report"
    cat $report
    for text in "ended: core-failure" "core $core" "$2" "core+0x.* <$3" "guest as it last entered\|cr3 0x"; do
        grep -q "$text" $report || fail "fault $1: nothing about '$text'"
        # All but the head is on standard error, too.
    done
    grep -q "$2" /tmp/out || fail "fault $1: standard error does not say '$2'"
    rm $report
}
core_fails 1 'panicked at blanket/core/src/inject.rs:[0-9]*:[0-9]*' '.*Context'
core_fails 2 'fault 14 (error 0x0) in the core' '.*Context'
core_fails 3 'the core is in a loop that does not end' '.*Context'

# A loop that lets the host in is no more than a guest that is busy.
hostile --inject --name open --cmdline inject=4 >/tmp/out 2>&1 &
open=$!
until blanket stats open >/tmp/out 2>&1 && grep -q . /tmp/console; do :; done
blanket kill open || fail "it cannot be killed"
wait $open
[ $? = 6 ] || fail "a loop that lets the host in did not end as a VM that is killed"

wait $neighbour || { cat /tmp/guest.log; echo "FAILED: the neighbour noticed"; exit 1; }
tail -n 3 /tmp/guest.log
echo CORE-FAILURE-OK
