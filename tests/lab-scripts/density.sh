# Runs in an instance: many small VMs at once, each in a memory cgroup of its own so
# that what it costs is counted. All must answer on their consoles after all have
# started, and cost little beside their memory.
#   GUESTS how many; MEMORY of each; TARGET what each is left with in the end
#   MOST   KiB that one may cost on average
#   MERGED the host's KSM merges what is the same in them, at least so many MiB; then
#          nothing is said of costs
cd "$(mktemp -d)" || exit 1
guests=${GUESTS:-8} memory=${MEMORY:-96M} target=${TARGET:-64M} most=${MOST:-5120}
fail() { echo "FAILED: $*"; tail -n 5 said last.log 2>/dev/null; exit 1; }

# The least that can answer: busybox and a loop.
mkdir -p root/bin root/dev root/proc
cp /bin/busybox root/bin/
ln -s busybox root/bin/sh
cat >root/init <<'S'
#!/bin/sh
/bin/busybox mount -t devtmpfs dev /dev
exec </dev/hvc0 >/dev/hvc0 2>&1
/bin/busybox stty -echo
echo LISTENS
while read -r word number; do echo "ANSWER $number"; done
echo "END OF INPUT"
S
chmod 755 root/init
(cd root && find . | cpio -o -H newc 2>/dev/null) >small.img

mkdir -p /sys/fs/cgroup
mount -t cgroup2 cgroup /sys/fs/cgroup || fail "no cgroups"
echo +memory >/sys/fs/cgroup/cgroup.subtree_control || fail "no memory cgroups"
cat >in-group <<'S'
#!/bin/sh
mkdir "/sys/fs/cgroup/$1" && echo $$ >"/sys/fs/cgroup/$1/cgroup.procs" || exit 1
shift
exec "$@"
S
chmod 755 in-group
available=$(awk '$1 == "MemAvailable:" { print $2 }' /proc/meminfo)

n=0
while [ $n -lt "$guests" ]; do
    n=$((n + 1))
    : >g$n.log
    ./in-group g$n blanket run --detach --name g$n --kernel /guest/vmlinuz --initrd small.img \
        --memory "$memory" --cmdline "quiet panic=-1" ${MERGED:+--mergeable} --console file:g$n.log >said 2>&1 || fail "g$n does not start"
    # Two boot at a time: the instance has two CPUs.
    before=$((n - 1))
    [ $before = 0 ] || until grep -q LISTENS g$before.log; do
        blanket stats g$before >/dev/null 2>said || { cp g$before.log last.log; fail "g$before is gone"; }
        sleep 0.2
    done
done
until grep -q LISTENS g$n.log; do sleep 0.2; done
[ "$(blanket ps | awk 'NR > 1' | wc -l)" = "$guests" ] || fail "not all run: $(blanket ps)"
echo "all $guests run"

# ask WORD: all are asked at once. The answers come in any order, on their consoles.
ask() {
    consoles=
    n=0
    while [ $n -lt "$guests" ]; do
        n=$((n + 1))
        { echo "there $1$n"; until grep -q "ANSWER $1$n" g$n.log; do sleep 0.2; done; } | blanket console g$n >/dev/null 2>&1 &
        # The console outlives its input; the VM does not notice.
        consoles="$consoles $!"
    done
    n=0
    while [ $n -lt "$guests" ]; do
        n=$((n + 1))
        until tr -d '\r' <g$n.log | grep -qx "ANSWER $1$n"; do
            blanket stats g$n >/dev/null 2>said || { cp g$n.log last.log; fail "g$n is gone"; }
            sleep 0.2
        done
    done
    kill $consoles 2>/dev/null
}
ask whole
echo "all $guests answer"

if [ -n "$MERGED" ]; then
    ksm=/sys/kernel/mm/ksm
    apart=$(awk '$1 == "MemAvailable:" { print $2 }' /proc/meminfo)
    echo 20000 >$ksm/pages_to_scan
    echo 10 >$ksm/sleep_millisecs
    echo 1 >$ksm/run
    # A page is merged in the second scan that finds it as it was in the first.
    until [ "$(cat $ksm/full_scans)" -ge 4 ]; do sleep 1; done
    together=$(awk '$1 == "MemAvailable:" { print $2 }' /proc/meminfo)
    sharing=$(($(cat $ksm/pages_sharing) / 256))
    echo "MERGED guests=$guests memory=$memory used=$(((available - apart) / 1024))MiB \
saved=${sharing}MiB kept=$(($(cat $ksm/pages_shared) / 256))MiB available=$(((together - apart) / 1024))MiB more"
    [ $sharing -ge "$MERGED" ] || fail "only $sharing MiB were merged"
    ask again
    echo "all $guests answer"
    n=0
    while [ $n -lt "$guests" ]; do
        n=$((n + 1))
        blanket kill g$n || fail "kill: $?"
    done
    echo "DENSITY-OK"
    exit 0
fi

n=0
while [ $n -lt "$guests" ]; do
    n=$((n + 1))
    blanket balloon g$n "$target" --timeout 120 >said 2>&1 || fail "g$n has not come down to $target"
done
ask less
echo "all $guests answer with $target"

# What each costs beside its memory: the VMM's pages in proportion to who shares them,
# and what the kernel holds for it: core, shadow tables, page tables, stacks. A line for
# each, in KiB: its memory, VMM, kernel, of that shadow pages.
ram() { awk '/^[0-9a-f]+-[0-9a-f]+ / { guest = /memfd:blanket-vm/ } /^Pss:/ { if (guest) ram += $2; else rest += $2 }
    END { print ram + 0, rest + 0 }' "/proc/$1/smaps"; }
blanket ps | awk 'NR > 1 { print $1, $2 }' >all
: >costs
while read -r name pid; do
    kernel=$(awk '$1 == "kernel" { print int($2 / 1024) }' "/sys/fs/cgroup/$name/memory.stat")
    shadow=$(blanket stats "$name" --format prometheus | awk '/^blanket_shadow_pages/ { print $2 * 6 }')
    echo "$name $(ram "$pid") ${kernel:-0} $shadow" | tee -a costs
done <all
left=$(awk '$1 == "MemAvailable:" { print $2 }' /proc/meminfo)
awk -v most="$most" -v memory="$memory" -v target="$target" -v host="$BLANKET_HOST" -v taken=$((available - left)) '
    { n++; ram += $2; vmm += $3; kernel += $4; shadow += $5; if ($3 + $4 > worst) worst = $3 + $4; if ($2 > has) has = $2 }
    END {
        cost = (vmm + kernel) / n
        printf "DENSITY host=%s guests=%d memory=%s target=%s touched=%d vmm=%d kernel=%d shadow=%d cost=%d worst=%d taken=%d\n",
            host, n, memory, target, ram / n, vmm / n, kernel / n, shadow / n, cost, worst, taken
        if (has > target * 1024 + 256) { print "one has " has " KiB of its memory"; exit 1 }
        exit cost > most
    }' costs || fail "a VM costs more than $most KiB beside its memory, or has more than $target"

while read -r name pid; do blanket kill "$name" || fail "kill: $?"; done <all
[ "$(blanket ps | awk 'NR > 1' | wc -l)" = 0 ] || fail "some are left"
echo "DENSITY-OK"
