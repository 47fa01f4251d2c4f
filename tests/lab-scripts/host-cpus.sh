# Runs in an instance of two CPUs: its CPU 1 goes off line and comes back, again and
# again, while VMs work.
#   ROUNDS  how often
rounds=${ROUNDS:-4}
start one --cpus 2
start two
ticking one
ticking two
cpu=/sys/devices/system/cpu/cpu1/online
round=0
while [ $round -lt $rounds ]; do
    echo 0 >$cpu || fail "off line"
    ticking one 1
    ticking two 1
    echo 1 >$cpu || fail "on line"
    ticking one 1
    ticking two 1
    round=$((round + 1))
done
echo "ok: $rounds times off line and back, ticks $(ticks one) and $(ticks two)"
blanket kill one && blanket kill two || fail "kill: $?"
echo "CPUS-OK"
