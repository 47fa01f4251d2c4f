# Runs in a Debian with systemd as the instance: the scopes that VMs' processes are in, as systemd
# and the kernel see them, for root and for a user; what ends with them, and what does not.
cgroups=/sys/fs/cgroup
fail() {
    echo "FAILED: $*"
    for log in *.log ~alice/*.log /run/blanket/*.log; do
        [ -e "$log" ] || continue
        echo "-- $log"
        tail -n 20 "$log" | tr -d '\r'
    done
    systemctl list-units --all --no-pager --type scope
    journalctl --no-pager -n 60
    exit 1
}
group_of() { echo "$cgroups$(sed -n 's/^0:://p' "/proc/$1/cgroup")"; }
property() { systemctl show --value --property "$2" "$1"; }
units() { systemctl list-units --all --plain --no-legend "$@"; }
# gone UNIT GROUP: systemd does not know the scope any more, nor the kernel.
gone() {
    unit_gone=$1
    until_true "systemd still has $1" '[ -z "$(units "$unit_gone")" ]'
    [ ! -e "$2" ] || fail "the group $2 stays"
}

is systemd "$(cat /proc/1/comm)" "process 1"
systemctl --version | head -n 1
blanket doctor >doctor.log
grep -q "^ok *limits .*scopes of systemd" doctor.log || fail "doctor does not see them"
mine=$(group_of self)

# Root's VMs. The unit that this script is has none of them.
start one --cpu-max 150 --pids-max 200
start two --memory-max 400M
ticking one
ticking two
one=$(pid_of one) two=$(pid_of two)
unit1=blanket-one-$one.scope unit2=blanket-two-$two.scope
group1=$(group_of "$one") group2=$(group_of "$two")
is "$cgroups/system.slice/$unit1" "$group1" "one's group"
is "$cgroups/system.slice/$unit2" "$group2" "two's group"
for vm in 1 2; do
    eval "unit=\$unit$vm group=\$group$vm"
    is active "$(systemctl is-active "$unit")" "$unit"
    is "$group" "$cgroups$(property "$unit" ControlGroup)" "$unit: ControlGroup"
    is yes "$(property "$unit" Transient)" "$unit: Transient"
    is 1 "$(cat "$group/memory.oom.group")" "$unit: memory.oom.group"
done
is "$one" "$(cat "$group1/cgroup.procs")" "one's processes"
is "$two" "$(cat "$group2/cgroup.procs")" "two's processes"
! grep -qx -e "$one" -e "$two" "$mine/cgroup.procs" || fail "a VM is left where it was started"
case $(property "$unit1" CPUQuotaPerSecUSec) in
1.5*s) ;;
*) fail "one: CPUQuotaPerSecUSec is $(property "$unit1" CPUQuotaPerSecUSec)" ;;
esac
is "150000 100000" "$(cat "$group1/cpu.max")" "one: cpu.max"
is 200 "$(property "$unit1" TasksMax)" "one: TasksMax"
is 200 "$(cat "$group1/pids.max")" "one: pids.max"
is $((400 << 20)) "$(property "$unit2" MemoryMax)" "two: MemoryMax"
is $((400 << 20)) "$(cat "$group2/memory.max")" "two: memory.max"
is 1024 "$(cat "$group2/pids.max")" "two: the default of pids.max"
is "max 100000" "$(cat "$group2/cpu.max")" "two: cpu.max"
limit=$(cat "$group1/memory.max")
[ "$limit" -gt $((180 << 20)) ] && [ "$limit" -lt $((240 << 20)) ] || fail "one: memory.max is $limit"
blanket stats one --json | grep -q "\"memory_max_bytes\": $limit" || fail "stats does not say it"
blanket ps --json | grep -q "\"cgroup\": \"$group2\"" || fail "ps does not say it"
[ "$(cat "$group1/memory.current")" -gt $((32 << 20)) ] || fail "one's memory is not charged to its scope"
echo "ok: root's scopes $unit1 and $unit2"

# A guest that listens powers off when its scope is stopped; the kernel runs what an init would
# listen to.
obeying poweroff
blanket run --name polite --kernel /guest/vmlinuz --initrd obeys.img --memory 128M \
    --cmdline "quiet panic=-1" --console file:polite.log --json </dev/null 2>polite.end.log &
process=$!
until_true "polite does not start" 'blanket stats polite >/dev/null 2>&1'
ticking polite
is "$process" "$(pid_of polite)" "polite's process"
unit=blanket-polite-$process.scope group=$(group_of "$process")
is "$cgroups/system.slice/$unit" "$group" "polite's group"
systemctl stop "$unit" || fail "stop: $?"
wait "$process"
is 143 $? "polite's exit code"
grep -q '"end":"poweroff"' polite.end.log || fail "polite did not power itself off"
gone "$unit" "$group"
echo "ok: systemctl stop lets a guest power off"

# One that does not listen has 15 seconds. What it had is cleared away.
uid2=$(awk '/^Uid:/ { print $2 }' "/proc/$two/status")
systemctl stop "$unit2" || fail "stop: $?"
gone "$unit2" "$group2"
[ ! -e "/proc/$two" ] || fail "two lives"
until_true "two's lock stays" '[ ! -e /run/blanket/users/$uid2 ]'
[ ! -e /run/blanket/two.sock ] || fail "two's socket stays"
ticking one
echo "ok: systemctl stop ends a guest that does not listen"

# However a VM ends, its scope goes, and is no failed unit.
for how in killed ended limited; do
    start three
    ticking three 1
    three=$(pid_of three)
    unit=blanket-three-$three.scope group=$(group_of "$three")
    is "$cgroups/system.slice/$unit" "$group" "three's group"
    case $how in
    killed) kill -9 "$three" ;;
    ended) blanket kill three || fail "kill: $?" ;;
    limited)
        # An administrator may change the limits as those of any unit.
        systemctl set-property --runtime "$unit" MemoryMax=300M || fail "set-property: $?"
        is $((300 << 20)) "$(cat "$group/memory.max")" "three: memory.max"
        blanket kill three || fail "kill: $?"
        ;;
    esac
    gone "$unit" "$group"
done
is "" "$(units --failed 'blanket-*')" "failed units"
ticking one
echo "ok: scopes go with their VMs"

# A VM outlives the service that started it.
systemd-run --quiet --wait --unit=starter --working-directory="$PWD" --setenv=BLANKET_HOST="$BLANKET_HOST" \
    blanket run --detach --name four --kernel /guest/vmlinuz --initrd tick.img --memory 128M \
    --cmdline "quiet panic=-1" --console file:four.log || fail "four does not start: $?"
until_true "starter goes on" '! systemctl is-active --quiet starter'
ticking four
four=$(pid_of four)
unit=blanket-four-$four.scope group=$(group_of "$four")
is "$cgroups/system.slice/$unit" "$group" "four's group"
blanket kill four || fail "kill: $?"
gone "$unit" "$group"
echo "ok: a VM outlives the service that started it"

# The limit of memory holds.
overeats fat.end.log
[ $code = 137 ] || [ $code = 7 ] || fail "fat ended with $code"
dmesg | grep -q "oom-kill:.*blanket-fat" || fail "it was not the limit"
until_true "fat's unit stays" '[ -z "$(units "blanket-fat*")" ]'
is "" "$(units --failed 'blanket-*')" "failed units"
ticking one
# The kernel's report is what this was for; it has one call trace.
[ "$(dmesg | grep -c 'Call Trace:')" = "$(dmesg | grep -c 'invoked oom-killer')" ] || fail "more than that in dmesg"
dmesg -c >/dev/null
echo "ok: the limit of memory"

# A user, who may use the device as the packages have it, in a login session of his.
groupadd --system blanket
useradd --create-home --groups blanket alice
chgrp blanket /dev/blanket && chmod 660 /dev/blanket
cp tick.img ~alice/
chown alice: ~alice/tick.img
alice() { su - alice -c "$*"; }
# alice_starts NAME [options]
alice_starts() {
    name=$1
    shift
    alice "blanket run --detach --name $name --kernel /guest/vmlinuz --initrd tick.img --memory 128M \
        --cmdline 'quiet panic=-1' --console file:\$HOME/$name.log $*"
}
# As it stands, this Debian has no bus for users: VMs run without limits, and say so.
loginctl enable-linger alice || fail "linger: $?"
user=$(id -u alice)
if alice_starts limited --memory-max 300M 2>said.log; then fail "a limit of nothing"; fi
grep -q "systemd makes no scope" said.log && grep -q "dbus-user-session" said.log || fail "no next step: $(cat said.log)"
alice blanket doctor >doctor.log
grep -q "^warn *limits .*no /run/user/$user/bus" doctor.log || fail "doctor has no word of it"
alice_starts free || fail "free: $?"
alice blanket ps --json | grep -q '"unlimited": "systemd makes no scope' || fail "ps has no word of it"
alice blanket kill free || fail "kill: $?"
echo "ok: a user without a bus"

# The same with the units of dbus-user-session.
cat >/etc/systemd/user/dbus.socket <<'U'
[Socket]
ListenStream=%t/bus
ExecStartPost=-/usr/bin/systemctl --user set-environment DBUS_SESSION_BUS_ADDRESS=unix:path=%t/bus
[Install]
WantedBy=sockets.target
U
cat >/etc/systemd/user/dbus.service <<'U'
[Unit]
Requires=dbus.socket
[Service]
Type=notify
NotifyAccess=main
ExecStart=/usr/bin/dbus-daemon --session --address=systemd: --nofork --nopidfile --systemd-activation --syslog-only
U
alice systemctl --user daemon-reload || fail "reload: $?"
alice systemctl --user start dbus.socket || fail "the user's bus: $?"
alice blanket doctor | grep -q "^ok *limits .*scopes of systemd" || fail "doctor does not see the user's bus"
alice_starts five --memory-max 300M --cpu-max 70 --pids-max 150 || fail "five: $?"
cd ~alice || fail "no home"
five=$(alice blanket ps | awk '$1 == "five" { print $2 }')
ticking_of_alice() {
    from=$(ticks five)
    until_true "five does not work" '[ "$(ticks five)" -gt "${from:-0}" ] 2>/dev/null'
}
ticking_of_alice
unit=blanket-five-$five.scope group=$(group_of "$five")
echo "the user's scope is $group"
case $group in
"$cgroups/user.slice/user-$user.slice/user@$user.service/"*"/$unit") ;;
*) fail "five's group is $group" ;;
esac
is active "$(alice systemctl --user is-active "$unit")" "$unit"
is "$five" "$(cat "$group/cgroup.procs")" "five's processes"
is $((300 << 20)) "$(cat "$group/memory.max")" "five: memory.max"
is 1 "$(cat "$group/memory.oom.group")" "five: memory.oom.group"
is "70000 100000" "$(cat "$group/cpu.max")" "five: cpu.max"
is 150 "$(cat "$group/pids.max")" "five: pids.max"
alice systemctl --user stop "$unit" || fail "the user's stop: $?"
until_true "five's group stays" '[ ! -e "$group" ]'
is inactive "$(alice systemctl --user is-active "$unit")" "$unit"
[ ! -e "/proc/$five" ] || fail "five lives"
echo "ok: a user's scope"

# Without lingering, a user's VMs end some seconds after his last session.
alice_starts five || fail "five: $?"
five=$(alice blanket ps | awk '$1 == "five" { print $2 }')
group=$(group_of "$five")
ticking_of_alice
loginctl disable-linger alice || fail "linger: $?"
until_true "the user's manager goes on" '[ "$(systemctl is-active user@$user.service)" = inactive ]'
[ ! -e "/proc/$five" ] && [ ! -e "$group" ] || fail "five outlives its user's manager"
cd - >/dev/null || fail "no way back"
ticking one
echo "ok: a user who leaves"

blanket kill one || fail "kill: $?"
gone "$unit1" "$group1"
is "" "$(units 'blanket-*')" "units"
echo "SYSTEMD-SCOPE-OK"
