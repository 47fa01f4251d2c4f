# Runs in an instance whose CPU a debugger stops, to inject NMIs or machine checks. It
# tells where, by the third serial line, and is told how many there were.
#   EVENT  their name in /proc/interrupts; HANDLER  the kernel's function for them
stty -F /dev/ttyS2 raw -echo
exec 3<>/dev/ttyS2
events() { awk -v name=$EVENT: '$1 == name { print $2 }' /proc/interrupts; }
fail() { echo "$*"; tail -n 20 /tmp/log; exit 1; }
# Three beats of the VM's from now on.
beats() { timeout 60 sh -c 'tail -n 0 -f /tmp/log | grep -q -m 3 BEAT'; }

cat >/tmp/script <<'S'
i=0
while :; do
    i=$((i + 1))
    [ $(expr $i + 1) = $((i + 1)) ] || exit 1
    echo BEAT $i
done
S
lab-initrd /tmp/script >/tmp/initrd
blanket run --name beats --kernel /guest/vmlinuz-cloud --initrd /tmp/initrd --memory 128M \
    --cmdline "console=hvc0 panic=-1 oops=panic" </dev/null >/tmp/log 2>&1 &
beats || fail "the VM did not come up"
before=$(events)
for symbol in blanket_world_switch blanket_world_exit $HANDLER; do
    awk -v name=$symbol '$3 == name { print name, $1 }' /proc/kallsyms >&3
done
echo ready >&3
read -r word count <&3
[ "$word" = done ] || fail "told '$word $count'"
seen=$(($(events) - before))
echo "$EVENT: $seen came, $count were injected"
[ "$seen" -ge "$count" ] || fail "some were lost"
beats || fail "the VM stands still"
blanket kill beats
