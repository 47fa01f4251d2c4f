# Runs in an instance with the module loaded: each thing that can be wrong is told
# by one error that names it, with the next step, and by doctor.
cd "$(mktemp -d)" || exit 1
fail() { echo "FAILED: $*"; cat said; exit 1; }

# refused WHAT TEXT NEXT COMMAND...: COMMAND ends with 1 and says TEXT and NEXT.
refused() {
    what=$1 text=$2 next=$3
    shift 3
    "$@" >said 2>&1
    code=$?
    [ $code = 1 ] || fail "$what: exit code $code"
    grep -q -e "$text" said || fail "$what: nothing about '$text'"
    grep -q -e "$next" said || fail "$what: no next step '$next'"
    if grep -q panicked said; then fail "$what: a panic"; fi
    echo "ok: $what"
}
run() { blanket run --memory 128M "$@" </dev/null; }
nobody() { su -s /bin/sh nobody -c "$*" </dev/null; }

refused "a kernel that is missing" "/no/kernel" "--kernel" run --kernel /no/kernel
refused "an initrd that is missing" "/no/initrd" "--initrd" \
    run --kernel /guest/vmlinuz --initrd /no/initrd
dd if=/guest/vmlinuz of=cut bs=1024 count=3000 2>/dev/null
refused "a kernel that is cut off" "cut: is corrupt" "fetch the file again" run --kernel cut
cp /guest/vmlinuz damaged
dd if=/dev/zero of=damaged bs=1024 seek=3000 count=16 conv=notrunc 2>/dev/null
refused "a kernel with damage inside" "damaged: is corrupt" "fetch the file again" run --kernel damaged
refused "a file that is no kernel" "is not a Linux kernel" "give the vmlinuz" run --kernel /etc/passwd
refused "a program for no Xen" "has no Xen PV entry" "use a kernel of Debian" run --kernel /bin/busybox
refused "doctor on that one" "has no Xen PV entry" "use the vmlinuz of" blanket doctor --kernel /bin/busybox
refused "too little memory" "16 MiB of memory are too little" "--memory" \
    blanket run --kernel /guest/vmlinuz --memory 16M
refused "no permission" "no permission to open /dev/blanket" "run blanket as root" \
    nobody blanket run --kernel /guest/vmlinuz
refused "doctor without permission" "^FAIL *device *no permission" "usermod" nobody blanket doctor
chmod 600 cut
refused "a kernel that may not be read" "ermission denied" "chmod +r" nobody blanket run --kernel "$PWD/cut"

rmmod blanket
headers="linux-headers-$(uname -r)"
refused "module and headers missing" "/dev/blanket does not exist" "apt install $headers" \
    run --kernel /guest/vmlinuz
refused "doctor on that" "^FAIL *headers" "apt install $headers" blanket doctor
mkdir -p "/lib/modules/$(uname -r)/build"
touch "/lib/modules/$(uname -r)/build/Makefile"
refused "the module missing" "/dev/blanket does not exist" "modprobe blanket" run --kernel /guest/vmlinuz
refused "doctor on that" "^FAIL *module *not installed" "modprobe blanket" blanket doctor
touch /.dockerenv
refused "a container" "docker container" "on the host: sudo modprobe blanket" run --kernel /guest/vmlinuz
refused "doctor in a container" "^FAIL *container" "--device /dev/blanket" blanket doctor
rm /.dockerenv

# Nothing loads an unsigned module into a locked kernel. It stays locked.
[ -e /sys/kernel/security/lockdown ] || mount -t securityfs security /sys/kernel/security
echo integrity >/sys/kernel/security/lockdown
if insmod /lab/blanket.ko 2>said; then fail "a locked kernel takes the module"; fi
refused "lockdown" "locked down (integrity)" "lockdown=" run --kernel /guest/vmlinuz
refused "doctor under lockdown" "^FAIL *signatures *the kernel is locked" "lockdown=" blanket doctor
echo "FAILURES-OK"
