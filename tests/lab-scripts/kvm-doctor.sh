# Runs in an instance with KVM and without our module: VMs run, for any user who may
# open /dev/kvm, and each reason why they cannot is told.
blanket doctor || exit 1
said() { # PATTERN COMMAND...: it fails, and says so
    pattern=$1
    shift
    "$@" >/tmp/said 2>&1 && { cat /tmp/said; echo "FAILED: $* did not fail"; exit 1; }
    grep -q "$pattern" /tmp/said || { cat /tmp/said; echo "FAILED: no word of '$pattern'"; exit 1; }
}
mkdir -p /etc /tmp/runtime
echo 'user:x:1000:1000::/tmp:/bin/sh' >>/etc/passwd
echo 'user:x:1000:' >>/etc/group
chmod 1777 /tmp
chown 1000:1000 /tmp/runtime
export XDG_RUNTIME_DIR=/tmp/runtime
run="blanket run --host kvm --kernel /guest/vmlinuz"

# No permission, no device.
chmod 600 /dev/kvm
said "no permission to open /dev/kvm" su user -c "$run"
said "usermod -aG kvm" su user -c "$run"
mv /dev/kvm /dev/kvm-away
said "/dev/kvm does not exist" $run
said "module" blanket run --kernel /guest/vmlinuz
mv /dev/kvm-away /dev/kvm

# An ordinary user, with the device and nothing else.
chmod 666 /dev/kvm
cat >/tmp/script <<'X'
[ "$(abi-test hypervisor)" = XenVMMXenVMM ] || { echo "a program sees another hypervisor"; exit 1; }
X
lab-initrd /tmp/script >/tmp/initrd
chmod 644 /tmp/initrd /guest/vmlinuz
su user -c "blanket run --on-reboot exit --kernel /guest/vmlinuz --initrd /tmp/initrd \
    --cmdline 'console=hvc0 quiet'" </dev/null >/tmp/out 2>&1
code=$?
cat /tmp/out
[ $code = 0 ] && tr -d '\r' </tmp/out | grep -qx 'GUEST-EXIT 0'
