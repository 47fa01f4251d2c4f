# For scripts in an instance that has a Debian image at /dev/vdb: VMs of it that one can
# log in to. It changes into a directory of its own.
cd "$(mktemp -d)" || exit 1
fail() {
    echo "FAILED: $*"
    for log in *.log; do
        echo "-- $log"
        tail -n 60 "$log" | tr -d '\r'
    done
    exit 1
}

# The host's end of the VM's network; for user mode a way out, which leads nowhere here.
tunctl -t vm0 >/dev/null
ip addr add 192.168.77.1/24 dev vm0
ip -6 addr add fd77::1/64 dev vm0
ip link set vm0 up
ip route add default via 10.77.0.254

ssh-keygen -q -t ed25519 -N '' -f key || fail "no key"
cat >user-data <<U
#cloud-config
# One kind of host key: an emulator makes RSA keys for minutes.
ssh_genkeytypes: [ed25519]
no_ssh_fingerprints: true
ssh: {emit_keys_to_console: false}
apt: {preserve_sources_list: true}
users:
  - name: user
    sudo: ALL=(ALL) NOPASSWD:ALL
    shell: /bin/bash
    ssh_authorized_keys: ["$(cat key.pub)"]
U
# systemd names what the kernel calls eth0.
cat >network <<'N'
version: 2
ethernets:
  enX0:
    addresses: [192.168.77.2/24, "fd77::2/64"]
  enX1:
    dhcp4: true
N

# A connection to a system that is gone ends, too.
OPTIONS="-i key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o ConnectTimeout=20
    -o ServerAliveInterval=30 -o ServerAliveCountMax=20"
# in_vm COMMAND...: as the user of the VM, over its first network.
in_vm() { ssh $OPTIONS user@192.168.77.2 "$@"; }

# launch IMAGE [options]: the VM `deb`. systemd gives devices and services 90 seconds, which is
# for machines that nobody emulates.
launch() {
    blanket run "$@" --cmdline systemd.default_timeout_start_sec=1500 --name deb --memory 1G --cpus 2 --net tap=vm0 --net user,tcp=127.0.0.1/2222:22 \
        --cloud-init user-data,network=network --console file:deb.log --attach-from "$PWD" \
        --detach >/dev/null
}
# boot IMAGE [options]: the same, until one can log in.
boot() {
    launch "$@" || fail "deb does not start: $?"
    login
}
login() {
    until in_vm true 2>/dev/null; do
        blanket stats deb >/dev/null 2>&1 || fail "deb is gone"
        sleep 1
    done
}
# Whole: all units started, none failed.
running() {
    state=$(in_vm systemctl is-system-running --wait)
    [ "$state" = running ] || { in_vm systemctl --failed; fail "the system is $state"; }
}
