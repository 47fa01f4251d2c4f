# Runs in an instance: another kernel takes its place while VMs work, on demand (HOW=now)
# or after a panic (HOW=crash). That kernel has the last word: it says that it is there.
start one --cpus 2
start two
ticking one
ticking two
cat >next <<'S'
line=/dev/ttyS1
stty -F $line raw -echo clocal
exec >$line 2>&1
code=0
if [ "$HOW" = crash ]; then
    [ -s /proc/vmcore ] || { echo "FAILED: no core of the kernel before"; code=1; }
fi
bad=$(dmesg | grep -cE 'WARNING: CPU|BUG: |Oops: |Call Trace:')
# It is alive, and memory is what it should be.
sum=$(dd if=/dev/zero bs=64k count=256 2>/dev/null | md5sum)
[ "${sum%% *}" = 2c7ab85a893283e98c931e9511add182 ] || { echo "FAILED: it computes wrong"; code=1; }
[ $code != 0 ] || echo "KEXEC-OK: $(cut -d' ' -f1 /proc/uptime) s after its start"
printf '\036LAB-EXIT %s %s %s\n' $LAB_NONCE $code $bad
S
lab-initrd next >next.img
kexec $HOW /guest/vmlinuz next.img \
    "console=ttyS0 tsc=reliable panic=-1 quiet nr_cpus=1 HOW=$HOW LAB_NONCE=$LAB_NONCE" || fail "kexec: $?"
# Only the panic's kernel is not started by that.
ticking one 1
ticking two 1
echo "the instance panics"
echo 1 >/proc/sys/kernel/sysrq
echo c >/proc/sysrq-trigger
fail "no panic"
