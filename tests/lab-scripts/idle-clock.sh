# Runs in an instance: a VM that is left idle uses under 1 % of a CPU, and
# before and afterwards its clock agrees with the instance's to 10 ms; meanwhile it goes as that does, to 2 ms.
seconds=15
cat >/tmp/script <<'X'
echo READY-TO-IDLE
for _ in before after; do
    read -r _ </dev/console
    abi-test clock
done
X
mkfifo /tmp/in /tmp/out
exec 4<>/tmp/in
lab-initrd /tmp/script >/tmp/initrd
blanket run --on-reboot exit --kernel /guest/vmlinuz --initrd /tmp/initrd --memory 256M --cpus 1 \
    --cmdline "console=hvc0 panic=-1 oops=panic" <&4 >/tmp/out 2>&1 &
exec 5</tmp/out
# As it comes and in pieces: until a kernel has a clock source it counts ticks, and loses those that come while a reader of
# letter after letter has its CPU.
await() {
    awk -v mark="$1" '{ print } index($0, mark) { exit }' <&5 >/tmp/heard
    cat /tmp/heard
    line=$(tail -n 1 /tmp/heard)
    case $line in *"$1"*) return 0 ;; esac
    echo "the VM ended before it said $1"; exit 1
}
realtime() { set -- $*; echo "$3"; }
# compare: with the instance's clock; $behind is how far it is from when it was asked, ns.
compare() {
    first=$(realtime $(abi-test clock))
    echo go >&4
    await "CLOCK realtime"
    last=$(realtime $(abi-test clock))
    inside=$(realtime $(echo "$line" | tr -d '\r' | sed 's/.*CLOCK/CLOCK/'))
    echo "clock: instance $first, VM $inside, instance $last"
    [ $inside -ge $((first - 10000000)) ] && [ $inside -le $((last + 10000000)) ] ||
        { echo "FAILED: the VM's clock is off by more than 10 ms"; exit 1; }
    behind=$((inside - first))
}

await READY-TO-IDLE
compare
at_first=$behind
pid=$(blanket ps | awk 'NR == 2 { print $2 }')
# User and system time of the whole process, guest included, in 10 ms.
ticks() { sed 's/.*) //' "/proc/$pid/stat" | { read -r _ _ _ _ _ _ _ _ _ _ _ user system _; echo $((user + system)); }; }
before=$(ticks)
sleep $seconds
used=$(($(ticks) - before))
echo "idle: $used of $((seconds * 100)) ticks"
[ $used -lt $seconds ] || { echo "FAILED: an idle VM used more than 1 % of a CPU"; exit 1; }

compare
went=$((behind - at_first))
echo "its clock went $went ns further than the instance's"
[ $went -gt -2000000 ] && [ $went -lt 2000000 ] || { echo "FAILED: it went wrong while it was idle"; exit 1; }
cat <&5 >/dev/null
wait $!
