# A node that is drained of VMS VMs at once, to another one inside KVM, and back again: each counts on
# from where it was, and what the command says of each is what the nodes list.
cat >script <<'S'
n=0
while :; do
    n=$((n + 1))
    echo "COUNT $n"
    sleep 1
done
S
lab-initrd script >/root/count.img
two_nodes a b
vms=$(seq ${VMS:-8} | sed 's/^/vm/')
for vm in $vms; do
    supercloud vm run --name $vm --kernel /guest/vmlinuz --initrd /root/count.img --memory 128M \
        --cmdline "console=hvc0 quiet panic=-1" || fail "$vm does not start"
done
# counts VM: what it has counted where it is.
counts() { supercloud vm logs $1 | tr -d '\r' | sed -n 's/^COUNT //p'; }
patience=300
for vm in $vms; do
    until_true "$vm does not count: $(supercloud vm logs $vm | tail -n 5)" '[ -n "$(counts $vm)" ]'
done
say "$(echo $vms | wc -w) VMs count on a"

# drained FROM TO
drained() {
    for vm in $vms; do counts $vm >$vm.before; done
    supercloud node drain $1 --at-once ${VMS:-8} >moved 2>&1 || fail "the drain of $1: $(cat moved; tail -n 20 a.log)"
    cat moved
    for vm in $vms; do
        is "$2 running" "$(supercloud vm list | awk -v vm=$vm '$1 == vm { print $2, $3 }')" "where $vm is"
        grep -q "$vm" moved || fail "no word about $vm"
        until_true "$vm does not go on" '[ "$(counts $vm | tail -n 1)" -gt $(($(tail -n 1 $vm.before) + 2)) ] 2>/dev/null'
        counts $vm | sort -n -u >$vm.after
        first=$(head -n 1 $vm.after)
        seq $first $(tail -n 1 $vm.after) >all
        cmp all $vm.after || fail "$vm has missed a number"
        last=$(tail -n 1 $vm.before)
        [ $first -gt $last ] || fail "$vm counts $first after $last"
    done
    [ "$(supercloud vm list | grep -c " $1 ")" = 0 ] || fail "$1 still has some: $(supercloud vm list)"
}
drained a b
[ "$(other 'blanket ps' | grep -c ' kvm ')" = ${VMS:-8} ] || fail "not all are inside KVM: $(other 'blanket ps')"
say "all of them count on b, inside KVM"
drained b a
say "all of them are back"
for vm in $vms; do
    supercloud vm stop $vm --now >/dev/null || fail "$vm does not end"
    supercloud vm rm $vm || fail "$vm cannot be removed"
done
kill $agent
wait $agent
is 0 $? "the agent's end"
echo "NODES-DRAIN-OK"
