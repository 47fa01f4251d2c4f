# For scripts that run in an instance: VMs in the background, and what the instance
# holds. Cases have it in front of theirs; it changes into a directory of its own.
cd "$(mktemp -d)" || exit 1
fail() {
    echo "FAILED: $*"
    # What VMs in the background say of themselves, and the instance, beside what guests do.
    for log in *.log /run/blanket/*.log; do [ -s "$log" ] && { echo "-- $log"; tail -n 20 "$log"; }; done
    echo "-- dmesg"
    dmesg | tail -n 20
    exit 1
}

# A guest that works until it is ended (`tick.sh`): TICK n after each piece of work, BAD if
# one went wrong.
mv /tmp/tick.sh tick
lab-initrd tick >tick.img

is() { [ "$1" = "$2" ] || fail "$3: '$2' instead of '$1'"; }
# until_true WHAT CONDITION: waits until it holds, `patience` seconds.
patience=180
until_true() {
    deadline=$(($(date +%s) + patience))
    until eval "$2"; do
        [ $(date +%s) -lt $deadline ] || fail "$1"
        sleep 0.1
    done
}
# listens PORT: waits until somebody does.
listens() { until_true "nobody listens at $1" "netstat -ltn | grep -q ':$1 '"; }
pid_of() { blanket ps | awk -v name="$1" '$1 == name { print $2 }'; }

# obeying WORD: obeys.img, a guest that ticks and does what it is asked to, `poweroff` or
# `reboot`: the kernel runs what an init would listen to.
obeying() {
    {
        echo "rm /bin/$1"
        echo "printf '#!/bin/sh\\nexec /bin/busybox $1 -f\\n' >/bin/$1"
        echo "chmod 755 /bin/$1"
        cat tick
    } >obeys
    lab-initrd obeys >obeys.img
}

# overeats LOG: runs a VM, `fat`, that uses more memory than it may have. How it ends: in `code`.
overeats() {
    cat >eat <<'E'
mount -o remount,size=95% /tmp
echo EATS
dd if=/dev/zero of=/tmp/food bs=1M count=200 2>/dev/null
echo SATED
E
    lab-initrd eat >eat.img
    blanket run --name fat --kernel /guest/vmlinuz --initrd eat.img --memory 256M --memory-max 120M \
        --cmdline "quiet panic=-1" --console file:fat.log </dev/null >"$1" 2>&1
    code=$?
    grep -q EATS fat.log || fail "fat never began"
    ! grep -q SATED fat.log || fail "fat had more than its limit"
}

# For a guest's script: `check NAME` compares sums of what it has written until /tmp/stop is
# there.
sums='check() {
    while [ ! -e /tmp/stop ]; do
        dd if=/dev/urandom bs=64k count=8 2>/dev/null | tee /tmp/$1 | md5sum >/tmp/$1.sum
        md5sum </tmp/$1 | cmp - /tmp/$1.sum || { echo WRONG; exit 1; }
    done
}'

# For a guest's script: /tmp/WORD is there when its user has written WORD on its console, the
# last of which is `end`. A `read` with a timeout instead loses the letters that it has when its time is over.
hears='exec 4<&0
while read word <&4; do : >"/tmp/$word"; [ "$word" != end ] || break; done &'

# tells VM WORD: writes it on its console.
tells() { echo $2 | blanket console $1 >/dev/null 2>&1 & }

# start NAME [options]: a VM in the background that ticks on NAME.log.
start() {
    name=$1
    shift
    blanket run --detach --name "$name" --kernel /guest/vmlinuz --initrd tick.img --memory 128M \
        --cmdline "quiet panic=-1" --console "file:$name.log" "$@" >/dev/null || fail "$name does not start: $?"
}
ticks() { tr -d '\r' <"$1.log" | sed -n 's/^TICK //p' | tail -n 1; }
# ticking NAME [N]: waits until it has worked N more times.
ticking() {
    from=$(ticks "$1")
    until [ "$(ticks "$1")" -ge $((${from:-0} + ${2:-2})) ] 2>/dev/null; do
        blanket stats "$1" >/dev/null 2>&1 || fail "$1 is gone"
        ! grep -q BAD "$1.log" || fail "$1 has worked wrong"
        sleep 0.2
    done
}

# A number from 0 below N, from a seed: random N sets $random.
random() {
    seed=$(((seed * 1103515245 + 12345) & 0x7fffffff))
    random=$((seed / 65536 % $1))
}

# Frames that are pinned, kernel memory that is not reclaimable (KiB), users of the
# module or of KVM.
pinned() { awk '/^nr_foll_pin_acquired/ { n += $2 } /^nr_foll_pin_released/ { n -= $2 } END { print n + 0 }' /proc/vmstat; }
# KiB of the files of this script and of the VMs' logs: they are memory, and no leak.
files() { df -kP / /tmp /run | awk 'NR > 1 { n += $3 } END { print n + 0 }'; }
meminfo() { awk -v k="$1:" '$1 == k { print $2 }' /proc/meminfo; }
users() {
    case $BLANKET_HOST in
    module) cat /sys/module/blanket/refcnt ;;
    *) cat /sys/module/kvm_amd/refcnt ;;
    esac
}
# KiB of free pages that a processor keeps for itself; up to tens of MiB, and no page
# that is available to Linux' own count.
kept() { awk '$1 == "count:" { n += $2 } END { print n * 4 }' /proc/zoneinfo; }
# KiB that could be had, after all that is only cached is gone.
available() {
    sync
    echo 3 >/proc/sys/vm/drop_caches
    echo $(($(meminfo MemAvailable) + $(kept) + $(files)))
}
# snapshot: what is held now that no VM runs.
snapshot() {
    snap_available=$(available)
    snap_pinned=$(pinned)
    snap_users=$(users)
    snap_kernel=$(($(meminfo SUnreclaim) + $(meminfo PageTables) + $(meminfo KernelStack) + $(meminfo Percpu)))
}
# nothing_leaked WHAT: compares with the last snapshot. What RCU frees comes back late,
# hence the tries; frames and users are exact.
nothing_leaked() {
    was_pinned=$snap_pinned was_users=$snap_users was_kernel=$snap_kernel was_available=$snap_available
    tries=0
    while :; do
        snapshot
        [ "$snap_pinned" = "$was_pinned" ] && [ "$snap_users" = "$was_users" ] &&
            [ $((snap_kernel - was_kernel)) -le 3072 ] && [ $((was_available - snap_available)) -le 4096 ] && break
        tries=$((tries + 1))
        [ $tries -lt 40 ] || fail "$1: pinned frames $was_pinned to $snap_pinned, users $was_users to $snap_users, \
kernel memory $was_kernel to $snap_kernel KiB, available $was_available to $snap_available KiB"
        sleep 0.5
    done
    echo "ok: $1: pinned $snap_pinned, users $snap_users, kernel $((snap_kernel - was_kernel)) KiB more, \
available $((snap_available - was_available)) KiB more"
}
