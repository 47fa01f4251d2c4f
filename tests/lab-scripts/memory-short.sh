# Runs in an instance: the host's memory does not last, first that of a VM's cgroup, then
# all of it. The VM that asks for too much ends, and the word is memory; the instance
# lives, a VM beside it works on, and nothing is left behind.
cat >eat <<'S'
mount -o remount,size=95% /tmp
echo EATS
dd if=/dev/zero of=/tmp/food bs=1M count=MIB 2>/dev/null
echo SATED
S
ps_word() { grep -q "memory" said.log || fail "$1: no word of memory"; }
# eat NAME MEMORY MIB COMMAND...: a VM of so much memory that touches so many MiB of it.
eat() {
    sed "s/MIB/$3/" eat >"$1.sh"
    lab-initrd "$1.sh" >"$1.img"
    name=$1 memory=$2
    shift 3
    "$@" blanket run --name "$name" --kernel /guest/vmlinuz --initrd "$name.img" --memory "$memory" \
        --cmdline "quiet panic=-1" --console "file:$name.log" </dev/null >said.log 2>&1
    code=$?
    grep -q EATS "$name.log" || fail "$name: it never began"
    ! grep -q SATED "$name.log" || fail "$name: there was enough"
    echo "$name ended with $code:"
    cat said.log
}
mkdir -p /sys/fs/cgroup
mount -t cgroup2 cgroup /sys/fs/cgroup || fail "no cgroups"
echo +memory >/sys/fs/cgroup/cgroup.subtree_control || fail "no memory cgroups"
mkdir /sys/fs/cgroup/small
echo $((120 << 20)) >/sys/fs/cgroup/small/memory.max
echo 0 >/sys/fs/cgroup/small/memory.swap.max 2>/dev/null
cat >in-small <<'S'
#!/bin/sh
echo $$ >/sys/fs/cgroup/small/cgroup.procs
exec "$@"
S
chmod 755 in-small

# One life for what the first one leaves in caches.
start warm
ticking warm
blanket kill warm
snapshot

start neighbour
ticking neighbour

# Killed by the kernel, which a process cannot outlive; so the word comes when it starts,
# and whoever looks for it later is told where to look.
eat limited 256M 200 ./in-small
[ $code = 137 ] || [ $code = 7 ] || fail "limited: $code"
grep -q "the memory cgroup .*small leaves it 1[01][0-9] MiB" said.log || fail "no word of the cgroup"
grep -q "^oom_kill [1-9]" /sys/fs/cgroup/small/memory.events || fail "it was not for memory"
if blanket stats limited 2>said.log; then fail "it is still there"; fi
grep -q "killed.*memory" said.log || fail "stats has no word of memory"
ticking neighbour
echo "ok: a memory cgroup that is too small"

# The kernel may kill the neighbour as well: memory that is shared is freed by a victim's
# end only, not by the kernel's reaper, and it looks for one more meanwhile.
if [ -n "$WHOLE" ]; then
    eat large 4G 3500
    [ $code = 137 ] || [ $code = 7 ] || fail "large: $code"
    grep -q "of memory are available" said.log || fail "no word of the instance's memory"
    dmesg | grep -q "Out of memory: Killed process [0-9]* (blanket)" || fail "the kernel has no word of it"
    ticking neighbour
    echo "ok: an instance that is too small"
fi

blanket kill neighbour || fail "kill: $?"
rmdir /sys/fs/cgroup/small || fail "the cgroup stays"
nothing_leaked "two that asked for too much"

# The reports of the kernel are what we were here for; each has one call trace.
[ "$(dmesg | grep -c 'Call Trace:')" = "$(dmesg | grep -c 'invoked oom-killer')" ] || fail "more than that in dmesg"
dmesg -c >/dev/null
echo "MEMORY-OK"
