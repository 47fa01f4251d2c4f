# Runs in an instance: a kernel that attacks the core, seed after seed, beside a VM
# that works. Whatever becomes of the attacker, the core must not find its own state
# wrong, the other VM must not notice, and neither must the instance.
#   SEEDS  how many; STEPS  attacks for each; FIRST  the first seed
seeds=${SEEDS:-6}
first=${FIRST:-1}
echo 'N=2 sh /tests/stress.sh' >/tmp/script
guest /tmp/script --cpus 1 >/tmp/guest.log 2>&1 &
neighbour=$!
whole=0
seed=$first
while [ $seed -lt $((first + seeds)) ]; do
    timeout 20 blanket run --on-reboot exit --kernel /bin/hostile --memory 32M --console file:/tmp/console \
        --json --cmdline "seed=$seed steps=${STEPS:-150}" >/tmp/out 2>&1 </dev/null
    code=$?
    line=$(tr -d '\r' </tmp/console | grep "^HOSTILE seed=" || true)
    [ -z "$line" ] || { whole=$((whole + 1)); echo "$line"; }
    case $code in
    # Powered off; asked for a restart; crashed; asked for what there is not; in a
    # loop of its own making until the time was over.
    0 | 3 | 4 | 8 | 143) ;;
    *)
        echo "FAILED: seed $seed ended with $code"
        cat /tmp/out
        exit 1
        ;;
    esac
    grep -q "HOSTILE begins" /tmp/console || { echo "FAILED: seed $seed never began"; cat /tmp/out; exit 1; }
    seed=$((seed + 1))
done
echo "$seeds seeds, $whole of them to their end"
wait $neighbour || { cat /tmp/guest.log; echo "FAILED: the neighbour noticed"; exit 1; }
tail -n 3 /tmp/guest.log
[ $whole -gt 0 ] || { echo "FAILED: no seed came to its end"; exit 1; }
