# Runs in an instance: its kernel moves the pages of a VM inside KVM all the time, and
# the VM does not notice. Nothing of ours takes part: the memory is ordinary memory.
moved() { sed -n 's/^pgmigrate_success //p' /proc/vmstat; }
cat >/tmp/script <<'S'
N=2 sh /tests/stress.sh
S
before=$(moved)
(while :; do echo 1 >/proc/sys/vm/compact_memory; done) &
mover=$!
guest /tmp/script --cpus 2
code=$?
kill $mover
count=$(($(moved) - before))
echo "$count pages were moved"
[ $code = 0 ] && [ $count -gt 500 ]
