# Runs in an instance: every root of running VMs is walked, while they boot, run hot
# and end, and maps nothing but their own frames and their hypervisor's pages.
#   RUN  more options for `blanket run`
echo 'N=2 sh /tests/stress.sh' >/tmp/script
name=audited
guest /tmp/script --cpus 3 --name $name $RUN >/tmp/$name.log 2>&1 &
vm=$!
until blanket ps | grep -q "^$name "; do
    kill -0 $vm || { cat /tmp/$name.log; exit 1; }
done
walks=0
while blanket ps | grep -q "^$name "; do
    if blanket audit $name >/tmp/audit 2>&1; then
        walks=$((walks + 1))
        cp /tmp/audit /tmp/last
    elif grep -q "BREAK A RULE" /tmp/audit; then
        cat /tmp/audit
        echo "FAILED: after $walks walks"
        exit 1
    elif ! grep -qE "no VM named|does not run|ended" /tmp/audit; then
        cat /tmp/audit
        exit 1
    fi
    # The VM is to get on in between.
    sleep 1
done
wait $vm || { cat /tmp/$name.log; echo "FAILED: the VM noticed"; exit 1; }
echo "$name: $walks walks, the last:"
cat /tmp/last
# Of a VM that ran: both of Linux's roots, and thousands of its pages.
awk '$2 == "roots" && $1 >= 2 && substr($3, 2) >= 1 && $7 >= 1000 { good = 1 } END { exit !good }' /tmp/last ||
    { echo "FAILED: too little was seen"; exit 1; }
[ $walks -ge 5 ] || { echo "FAILED: too few walks"; exit 1; }
