# Runs in an instance: its kernel moves the pages of a VM all the time and swaps them out
# to zram, because the VM's cgroup may have less memory than the VM uses. The VM takes
# digests of what it holds, finds nothing wrong, and leaves nothing behind.
# LIMIT is the cgroup's, CPUS the VM's, MIB and ROUNDS are what checksums.sh takes.
vmstat_of() { sed -n "s/^$1 //p" /proc/vmstat; }
group=/sys/fs/cgroup/vm
# A program in the VM's cgroup.
inside() { sh -c "echo 0 >$group/cgroup.procs && exec \"\$@\"" sh "$@"; }

before=$(available)

echo 1G >/sys/block/zram0/disksize
mkswap /dev/zram0 >/dev/null && swapon /dev/zram0 || exit 1
mount -t cgroup2 none /sys/fs/cgroup
echo +memory >/sys/fs/cgroup/cgroup.subtree_control
mkdir $group
echo $LIMIT >$group/memory.max || exit 1
pinned=$(vmstat_of nr_foll_pin_acquired)
moved=$(vmstat_of pgmigrate_success)
out=$(vmstat_of pswpout)
back=$(vmstat_of pswpin)

(while sleep 0.2; do echo 1 >/proc/sys/vm/compact_memory; done) &
mover=$!
echo "MIB=$MIB ROUNDS=$ROUNDS sh /tests/checksums.sh" >/tmp/script
inside guest /tmp/script --cpus $CPUS --stats-on-exit
code=$?
kill $mover
wait

moved=$(($(vmstat_of pgmigrate_success) - moved))
out=$(($(vmstat_of pswpout) - out))
back=$(($(vmstat_of pswpin) - back))
pinned=$(($(vmstat_of nr_foll_pin_acquired) - pinned))
swapoff /dev/zram0 && echo 1 >/sys/block/zram0/reset || exit 1
rmdir $group || exit 1
lost=$((before - $(available)))
echo "$moved pages moved, $out swapped out, $back swapped in, $pinned pinned"
echo "$lost KiB less are available than before"
[ $code = 0 ] || fail "the VM: $code"
[ $moved -gt 100 ] && [ $out -gt 5000 ] && [ $back -gt 500 ] || fail "too few were taken"
[ "$pinned" = 0 ] || fail "pages stay pinned"
[ $lost -le 4096 ] || fail "memory is lost"
