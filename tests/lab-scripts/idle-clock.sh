# Runs in an instance: a VM that is left idle uses under 1 % of a CPU, and
# meanwhile its clock goes as the instance's does, to 2 ms. It begins a little behind that: until it has a clock source, in its
# first quarter of a second, a kernel counts time by ticks, which are late when a CPU takes a nanosecond for each instruction.
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
await() {
    while read -r line <&5; do
        echo "$line"
        case $line in *"$1"*) return 0 ;; esac
    done
    echo "the VM ended before it said $1"; exit 1
}
realtime() { set -- $*; echo "$3"; }
# How far its clock is ahead of the instance's, ns: of when it was asked, which takes as long each time.
ahead() {
    instance=$(realtime $(abi-test clock))
    echo go >&4
    await "CLOCK realtime"
    ahead=$(($(realtime $(echo "$line" | tr -d '\r' | sed 's/.*CLOCK/CLOCK/')) - instance))
    echo "the VM's clock is $((ahead / 1000)) us ahead of when it was asked"
    [ $ahead -gt -25000000 ] && [ $ahead -lt 25000000 ] || { echo "FAILED: the VM's clock is off by more than 25 ms"; exit 1; }
}

await READY-TO-IDLE
ahead
at_first=$ahead
pid=$(blanket ps | awk 'NR == 2 { print $2 }')
# User and system time of the whole process, guest included, in 10 ms.
ticks() { sed 's/.*) //' "/proc/$pid/stat" | { read -r _ _ _ _ _ _ _ _ _ _ _ user system _; echo $((user + system)); }; }
before=$(ticks)
sleep $seconds
used=$(($(ticks) - before))
echo "idle: $used of $((seconds * 100)) ticks"
[ $used -lt $seconds ] || { echo "FAILED: an idle VM used more than 1 % of a CPU"; exit 1; }

ahead
off=$((ahead - at_first))
[ $off -gt -2000000 ] && [ $off -lt 2000000 ] || { echo "FAILED: the VM's clock has gone wrong by $off ns while it was idle"; exit 1; }
cat <&5 >/dev/null
wait $!
