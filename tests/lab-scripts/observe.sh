# Runs in an instance: the counters of a VM that works, in Prometheus' format, and its
# trace, switched on and off while it runs.
cd "$(mktemp -d)" || exit 1
fail() { echo "FAILED: $*"; tail -n 20 out; exit 1; }
cat >busy <<'S'
echo WORKS
while :; do /bin/true; done
S
lab-initrd busy >busy.img
blanket run --detach --name one --kernel /guest/vmlinuz --initrd busy.img --cpus 2 \
    --cmdline "quiet panic=-1" --console file:one.log >out || fail "run: $?"
until grep -q WORKS one.log; do blanket stats one >/dev/null || fail "the VM is gone"; sleep 0.2; done

# value METRIC LABEL: of the last scrape.
value() { awk -v m="$1{vm=\"one\"$2}" '$1 == m { print $2; found = 1 } END { exit !found }' out || fail "no $1 $2"; }
blanket stats --format prometheus >out || fail "stats: $?"
awk '!/^# (HELP|TYPE) blanket_[a-z_]+ / && !/^blanket_[a-z_]+\{vm="one"(,[a-z]+="[^"]*")*\} [0-9.e+]+$/ {
    print "not of the format: " $0; bad = 1 } END { exit bad }' out || fail "the format"
switches=$(value blanket_world_switches_total)
calls=$(value blanket_hypercalls_total ',hypercall="mmu_update"')
faults=$(value blanket_page_faults_total ',outcome="shadow"')
[ "$(value blanket_shadow_pages)" -gt 0 ] && [ "$(value blanket_memory_present_bytes)" -gt 10000000 ] ||
    fail "memory"
blanket console one </dev/null >/dev/null 2>&1 &
attached=$!
more() {
    blanket stats one --format prometheus >out || fail "stats: $?"
    [ "$(value blanket_world_switches_total)" -gt "$switches" ] &&
        [ "$(value blanket_hypercalls_total ',hypercall="mmu_update"')" -gt "$calls" ] &&
        [ "$(value blanket_page_faults_total ',outcome="shadow"')" -gt "$faults" ]
}
until more; do :; done
echo "ok: counters grow"
kill $attached

# On, with what a program that starts must show.
blanket trace one >out 2>said || fail "trace: $?"
grep -q "is on now" said || fail "it does not say that it is on"
whole() {
    blanket trace one >out || fail "trace: $?"
    for what in "hypercall multicall" " multicall update_va_mapping" "page fault at" "exit interrupt"; do
        grep -q "$what" out || return 1
    done
}
until whole; do :; done
[ "$(wc -l <out)" -gt 128 ] && [ "$(wc -l <out)" -le 512 ] || fail "$(wc -l <out) records of two vCPUs"
sed -n 1,5p out
blanket trace one --json >out
grep -q '^{"vcpu":[01],"number":[0-9]*,"tsc":' out || fail "the trace in JSON"
echo "ok: the trace shows entries and exits"

# Followed until it is ended; it was on before and stays so.
: >followed
blanket trace one --follow >followed 2>said &
follow=$!
until [ "$(wc -l <followed)" -gt 1500 ]; do kill -0 $follow || fail "it ended"; sleep 0.1; done
kill -TERM $follow
wait $follow || fail "trace --follow: $?"
awk '$1 + 0 < last { bad++ } { last = $1 + 0 } END { exit bad > NR / 10 }' followed || fail "times go back"
echo "ok: followed"

# Off: what there is stays, although the VM works on.
off() { blanket trace one --off --json >"$1" || fail "trace --off: $?"; }
off before
blanket stats one --format prometheus >out
switches=$(value blanket_world_switches_total) calls=$(value blanket_hypercalls_total ',hypercall="mmu_update"')
faults=$(value blanket_page_faults_total ',outcome="shadow"')
off before
until more; do :; done
off after
[ "$(wc -l <before)" -gt 128 ] && cmp before after || fail "it goes on"
blanket kill one || fail "kill: $?"
echo "ok: off"

# From the start, and over a reboot, when numbers begin again.
echo 'cat /proc/uptime; reboot -f' >again
lab-initrd again >again.img
blanket run --trace --detach --name two --kernel /guest/vmlinuz --initrd again.img \
    --cmdline "quiet panic=-1" --console file:two.log >out || fail "run: $?"
blanket trace two --follow --json >followed 2>said &
follow=$!
until blanket ps --json | grep -q '"boots": 3'; do kill -0 $follow || fail "it ended"; sleep 0.1; done
blanket kill two || fail "kill: $?"
wait $follow || fail "it does not end with its VM"
[ "$(grep -c '"number":' followed)" -gt 500 ] || fail "little was followed"
echo "OBSERVE-OK"
