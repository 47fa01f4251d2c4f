# Runs in an instance: its kernel moves the pages of a VM all the time, and the VM does
# not notice. Inside KVM nothing of ours takes part; under the module the notifier does.
moved() { sed -n 's/^pgmigrate_success //p' /proc/vmstat; }
cat >/tmp/script <<'S'
N=2 sh /tests/stress.sh && ROUNDS=4 sh /tests/checksums.sh
S
before=$(moved)
(while :; do echo 1 >/proc/sys/vm/compact_memory; done) &
mover=$!
guest /tmp/script --cpus ${CPUS:-2} --stats-on-exit
code=$?
kill $mover
count=$(($(moved) - before))
echo "$count pages were moved"
[ $code = 0 ] && [ $count -gt 500 ]
