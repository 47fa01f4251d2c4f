# Runs in an instance with passt and tun: in which box VMs' processes are, what is attached
# from outside of it, that limits hold, and that nothing of it is left behind.
cgroups=/sys/fs/cgroup
status() { sed -n "s/^$2:[[:space:]]*//p" "/proc/$1/status" | tr -s ' \t' ' ' | sed 's/ $//'; }

# Before there are control groups: VMs run without limits, and say so.
if blanket run --kernel /guest/vmlinuz --memory-max 300M 2>said.log </dev/null; then fail "a limit of nothing"; fi
grep -q "no control groups" said.log && grep -q "mount -t cgroup2" said.log || fail "no next step: $(cat said.log)"
blanket doctor | grep -q "^warn *limits .*no control groups" || fail "doctor has no word of it"
mkdir -p $cgroups
mount -t cgroup2 cgroup $cgroups || fail "no cgroups"
blanket doctor | grep -q "^ok *limits .*below $cgroups" || fail "doctor does not see them"
mkdir $cgroups/vms

# Files that are root's alone, in a directory that is, too.
cp /guest/vmlinuz kernel
dd if=/dev/zero of=disk.raw bs=1M count=8 2>/dev/null
chmod 600 kernel disk.raw
start one --cpu-max 150 --pids-max 200 --attach-from "$PWD"
start two --cgroup $cgroups/vms --memory-max 400M
ticking one
ticking two
one=$(pid_of one) two=$(pid_of two)
uid1=$(status "$one" Uid | cut -d ' ' -f 1) uid2=$(status "$two" Uid | cut -d ' ' -f 1)
[ "$uid1" -ge 1879048192 ] && [ "$uid2" -ge 1879048192 ] && [ "$uid1" != "$uid2" ] || fail "users $uid1 and $uid2"

# Each thread of theirs.
for vm in one two; do
    eval "pid=\$$vm"
    uid=$(status "$pid" Uid | cut -d ' ' -f 1)
    for thread in /proc/"$pid"/task/*; do
        thread=${thread#/proc/}
        is "$uid $uid $uid $uid" "$(status "$thread" Uid)" "$vm: user"
        is "$uid $uid $uid $uid" "$(status "$thread" Gid)" "$vm: group"
        is "" "$(status "$thread" Groups)" "$vm: groups"
        is 1 "$(status "$thread" NoNewPrivs)" "$vm: NoNewPrivs"
        is 2 "$(status "$thread" Seccomp)" "$vm: Seccomp"
        is 0000000000000000 "$(status "$thread" CapInh)" "$vm: CapInh"
        is 0000000000000000 "$(status "$thread" CapAmb)" "$vm: CapAmb"
    done
    for space in ipc uts net; do
        [ "$(readlink /proc/"$pid"/ns/$space)" != "$(readlink /proc/self/ns/$space)" ] || fail "$vm: namespace $space"
    done
done
# CAP_SYS_RESOURCE, and for disks that come later CAP_DAC_OVERRIDE, within Landlock.
is 0000000001000000 "$(status "$two" CapEff)" "two: CapEff"
is 0000000001000002 "$(status "$one" CapEff)" "one: CapEff"
echo "ok: users $uid1 and $uid2, capabilities, filters, namespaces"

# What one VM's user may do to the other's process, without the filter: nothing.
echo "vmone:x:$uid1:$uid1::/:/bin/sh" >>/etc/passwd
as_one() { su -s /bin/sh vmone -c "$*" 2>/dev/null; }
as_one "kill -0 $one" || fail "its own process cannot be signalled: this test finds nothing"
if as_one "kill -0 $two"; then fail "one signals two"; fi
for file in maps mem environ; do
    if as_one "head -c 1 /proc/$two/$file" >head.out && [ -s head.out ]; then fail "one reads $file of two"; fi
done
if as_one "ls /proc/$two/fd"; then fail "one sees what two has open"; fi
if as_one "ls /run/blanket"; then fail "one sees the control sockets"; fi
if blanket run --kernel /guest/vmlinuz --user "$uid1" 2>said.log </dev/null; then fail "a user for two VMs"; fi
grep -q "another VM's" said.log || fail "no word of whose it is: $(cat said.log)"
echo "ok: apart"

# Limits.
group1=$cgroups$(sed -n 's/^0:://p' /proc/"$one"/cgroup) group2=$cgroups$(sed -n 's/^0:://p' /proc/"$two"/cgroup)
is "$cgroups/blanket-one-$one" "$group1" "one's group"
is "$cgroups/vms/blanket-two-$two" "$group2" "two's group"
is "150000 100000" "$(cat "$group1/cpu.max")" "cpu.max"
is 200 "$(cat "$group1/pids.max")" "pids.max"
is $((400 << 20)) "$(cat "$group2/memory.max")" "memory.max"
is 1024 "$(cat "$group2/pids.max")" "the default of pids.max"
limit=$(cat "$group1/memory.max")
[ "$limit" -gt $((180 << 20)) ] && [ "$limit" -lt $((240 << 20)) ] || fail "memory.max is $limit"
blanket stats one --json | grep -q "\"memory_max_bytes\": $limit" || fail "stats does not say it"
blanket ps --json | grep -q "\"cgroup\": \"$group2\"" || fail "ps does not say it"
echo "ok: limits"

# What its process in its box cannot open is opened outside.
ip route add default via 10.77.0.254
tunctl -t vm1 >/dev/null
ip link set vm1 up
is eth0 "$(blanket net attach one user,tcp=127.0.0.1/2222:22)" "the user-mode network"
is eth1 "$(blanket net attach one tap=vm1)" "the tap"
is xvda "$(blanket disk attach one "$PWD/disk.raw,format=raw")" "the disk"
passt=$(pidof passt)
grep -qx "$passt" "$group1/cgroup.procs" || fail "passt has no limits"
blanket net list one >nets.log
grep -q "eth0.*user, forwards 127.0.0.1/2222:22" nets.log && grep -q "eth1.*tap vm1" nets.log || fail "net list"
if grep -q " down " nets.log; then fail "a network is down"; fi
nc 127.0.0.1 2222 </dev/null >/dev/null 2>&1 || fail "passt does not listen"
ticking one
echo "ok: networks and a disk of a running VM"

# Killed, it leaves a word about it and nothing else: neither passt nor group, user, socket.
kill -9 "$one"
until_true "passt outlives its VM" '! pidof passt >/dev/null'
until_true "the group stays" '[ ! -e "$group1" ]'
until_true "the user's lock stays" '[ ! -e /run/blanket/users/$uid1 ]'
[ ! -e /run/blanket/one.sock ] && grep -q 'process was killed' /run/blanket/one.crash || fail "files stay: $(ls /run/blanket)"
ticking two
blanket kill two || fail "kill: $?"
until_true "the second group stays" '[ ! -e "$group2" ]'
until_true "the second user's lock stays" '[ ! -e /run/blanket/users/$uid2 ]'
rmdir $cgroups/vms || fail "the group above stays"
echo "ok: nothing is left"

# A reboot reads a kernel that its user could not.
echo 'reboot -f' >again
lab-initrd again >again.img
blanket run --detach --name again --kernel kernel --initrd again.img --memory 128M --cmdline "quiet panic=-1" \
    --console file:again.log >/dev/null || fail "again: $?"
boots() { blanket ps --json | sed -n 's/.*"boots": \([0-9]*\).*/\1/p'; }
until [ "$(boots)" -ge 2 ] 2>/dev/null; do
    blanket stats again >/dev/null 2>&1 || { cat /run/blanket/again.log; fail "again is gone"; }
    sleep 0.2
done
blanket kill again
# One that is asked for from outside: the kernel runs what an init would listen to.
obeying reboot
blanket run --detach --name asked --kernel /guest/vmlinuz --initrd obeys.img --memory 128M \
    --cmdline "quiet panic=-1" --console file:asked.log >/dev/null || fail "asked: $?"
ticking asked
blanket reboot asked --timeout 120 || fail "asked does not reboot"
until_true "asked does not boot again" '[ "$(boots)" = 2 ]'
ticking asked
blanket kill asked
echo "ok: reboots"

# The limit of memory holds.
overeats said.log
[ $code = 137 ] || [ $code = 7 ] || fail "fat ended with $code"
dmesg | grep -q "oom-kill:.*blanket-fat" || fail "it was not the limit"
until_true "groups stay" '! ls -d $cgroups/blanket-* >/dev/null 2>&1'
until_true "locks stay" '[ -z "$(ls /run/blanket/users)" ]'
# The kernel's report is what this was for; it has one call trace.
[ "$(dmesg | grep -c 'Call Trace:')" = "$(dmesg | grep -c 'invoked oom-killer')" ] || fail "more than that in dmesg"
dmesg -c >/dev/null
echo "CONFINED-OK"
