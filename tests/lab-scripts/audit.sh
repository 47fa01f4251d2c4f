# Runs in an instance: every root of a VM is walked while it boots and while all its
# vCPUs run hot, and maps nothing but the VM's own frames and its hypervisor's pages.
cat >/tmp/script <<'X'
sum=$(seq 1 200000 | md5sum)
while :; do
    for job in 1 2 3; do
        (n=0; while [ $n -lt 20 ]; do /bin/true || echo BAD; n=$((n + 1)); done) &
    done
    seq 1 200000 >/tmp/file
    [ "$(md5sum </tmp/file)" = "$sum" ] || echo BAD
    rm /tmp/file
    wait
    echo TURN
done
X
guest /tmp/script --cpus 3 --name audited >/tmp/log 2>&1 &
vm=$!
fail() { echo "FAILED: $*"; cat /tmp/audit; tail -n 30 /tmp/log; blanket kill audited; exit 1; }
early=0
walks=0
while [ $walks -lt 6 ]; do
    kill -0 $vm || fail "the VM has ended"
    if blanket audit audited >/tmp/audit 2>&1; then
        if grep -q TURN /tmp/log; then walks=$((walks + 1)); else early=$((early + 1)); fi
    elif ! grep -qE "no VM named|no counters|only just|does not run" /tmp/audit; then
        fail "after $early walks of the booting VM and $walks of the running one"
    fi
    # The VM is to get on in between.
    sleep 1
done
turns=$(grep -c TURN /tmp/log)
# It runs on after the last walk.
until [ "$(grep -c TURN /tmp/log)" -gt $((turns + 1)) ]; do
    kill -0 $vm || fail "the VM has ended"
    sleep 1
done
blanket kill audited
! grep BAD /tmp/log || fail "the VM noticed"
echo "$early walks of the booting VM, $walks of the running one; the last:"
cat /tmp/audit
# Of a VM that runs: both of Linux's roots, and thousands of its pages.
awk '$2 == "roots" && $1 >= 2 && substr($3, 2) >= 1 && $7 >= 1000 { good = 1 } END { exit !good }' /tmp/audit ||
    { echo "FAILED: too little was seen"; exit 1; }
