# Runs in an instance with the module loaded, as root: the life of VMs through the
# command. Needs /guest/vmlinuz and lab-initrd SCRIPT, which prints an initramfs.
# Exits with 0 if every step did what it should.
cd "$(mktemp -d)" || exit 1
fail() { echo "FAILED: $*"; for log in *.log; do echo "-- $log"; tail -n 20 "$log"; done; exit 1; }
# is EXPECTED ACTUAL WHAT
is() { [ "$1" = "$2" ] || fail "$3: $2 instead of $1"; echo "ok: $3"; }
# until_line FILE TEXT: waits for a line of a log.
until_line() {
    tries=0
    until grep -q "$2" "$1" 2>/dev/null; do
        tries=$((tries + 1))
        [ $tries -lt 600 ] || fail "no line $2 in $1"
        sleep 0.1
    done
}
start() { name=$1 script=$2; shift 2; blanket run --name $name --kernel /guest/vmlinuz --initrd $script.img \
    --cmdline "quiet panic=-1" "$@"; }

# A guest that powers off when it is asked to, as one with a real init does.
cat >obedient <<'X'
rm /bin/poweroff
printf '#!/bin/sh\nexec /bin/busybox poweroff -f\n' >/bin/poweroff
chmod 755 /bin/poweroff
echo LISTENS
while :; do sleep 1; done
X
echo 'trap "" USR2; rm /bin/poweroff; echo DEAF; while :; do sleep 1; done' >deaf
echo 'reboot -f' >reboot
echo 'echo c >/proc/sysrq-trigger' >panic
echo 'stty -echo raw </dev/hvc0; echo TYPE; head -c 20000 </dev/hvc0 | md5sum' >typist
echo 'i=0; while [ $i -lt 2000 ]; do echo "line $i of many"; i=$((i + 1)); done' >chatty
for script in obedient deaf reboot panic typist chatty; do lab-initrd $script >$script.img; done

# In the background, listed, counted, stopped.
started=$(start one obedient --detach --console file:one.log) || fail "detached run: $?"
is one "$started" "a detached run prints the name"
until_line one.log LISTENS
is one "$(blanket ps | awk 'NR == 2 { print $1 }')" "ps lists it"
blanket ps --json | grep -q '"boots": 1' || fail "ps --json"
blanket stats one | grep -q mmu_update || fail "stats"
blanket upgrade one >upgrade.log
is 0 $? "it runs this blanket"
cp /bin/blanket newer
./newer upgrade one 2>upgrade.log
is 1 $? "it cannot change to another one"
grep -q "cannot change to a new one" upgrade.log && grep -q "blanket stop one" upgrade.log || fail "upgrade"
start one obedient </dev/null >second.log 2>&1
is 1 $? "a name that is taken is refused"
grep -q "a VM named one is running" second.log || fail "and the reason is told"
blanket stop one
is 0 $? "stop"
is 1 "$(blanket ps | wc -l)" "ps is empty again"

# One that does not listen.
start two deaf --detach --console file:two.log >/dev/null || fail "detached run: $?"
until_line two.log DEAF
blanket stop --timeout 1 two 2>stop.log
is 1 $? "stop of a guest that does not react"
grep -q "blanket kill two" stop.log || fail "and the next step is told"
blanket kill two
is 0 $? "kill"
blanket kill two 2>/dev/null
is 1 $? "kill of what is gone"

# The ways to end, by exit code.
start three reboot --on-reboot exit </dev/null >reboot.log 2>&1
is 3 $? "exit code after a reboot"
start three panic </dev/null >panic.log 2>&1
# Linux asks for a restart after a panic if it is told to by panic=.
code=$?
[ $code = 4 ] || fail "exit code after a panic: $code"
echo "ok: exit code after a panic"
# Not through the function: the signal is for blanket, not for a shell around it.
blanket run --kernel /guest/vmlinuz --initrd obedient.img --console file:term.log & pid=$!
until_line term.log LISTENS
kill -TERM $pid
wait $pid
is 143 $? "exit code after SIGTERM"
grep -q "System halted" term.log || fail "the guest was not asked to power off"

# A reboot starts it again, as often as it likes.
start four reboot </dev/null >again.log 2>&1 & pid=$!
tries=0
until blanket ps --json | grep -q '"boots": 3'; do
    tries=$((tries + 1))
    [ $tries -lt 600 ] || fail "no third boot"
    sleep 0.1
done
blanket kill four
wait $pid
is 6 $? "exit code after kill"

# The console in both directions, and all of its output.
start five typist --detach --console file:five.log >/dev/null || fail "detached run: $?"
until_line five.log TYPE
i=0
while [ $i -lt 2000 ]; do printf '%09d.' $i; i=$((i + 1)); done >typed
until_end() { cat typed; until grep -q GUEST-EXIT five.log; do sleep 0.1; done; }
until_end | blanket console five >attached.log 2>&1
sum=$(md5sum <typed)
grep -q "${sum%% *}" five.log || fail "what was typed did not arrive"
grep -q "${sum%% *}" attached.log || fail "what was printed did not arrive"
echo "ok: typing"
start six chatty --memory 128M </dev/null >chatty.log 2>&1
is 0 $? "exit code after poweroff"
is 2000 "$(tr -d '\r' <chatty.log | grep -c '^line [0-9]* of many$')" "lines of output"
is 1 "$(blanket ps | wc -l)" "nothing is left"
echo "LIFECYCLE-OK"
