# A whole Debian as a VM, as its user sees it: out of a disk image, set up by cloud-init,
# over its own network.
now() { read -r up _ </proc/uptime; echo "$up"; }
say() { echo "  [$(now) s] $*"; }

say "a qcow2 overlay on a Debian 12 image, and a VM of it:"
blanket disk create --backing /dev/vdb --backing-format raw debian.qcow2
blanket disk info debian.qcow2 --backing /dev
started=$(now)
boot debian.qcow2,backing=/dev
say "logged in by ssh over the VM's own network after $(echo "$(now) $started" | awk '{ printf "%.0f", $1 - $2 }') s"
running
in_vm '. /etc/os-release; echo "    $PRETTY_NAME, Linux $(uname -r), $(cat /sys/hypervisor/type), host name $(hostname), systemd says $(systemctl is-system-running)"'
blanket ps
blanket disk list deb
blanket net list deb

# A web server in the VM, its clients here.
in_vm 'mkdir www && cd www && for n in $(seq 1 40); do head -c 100000 /dev/urandom >file$n; done && md5sum file* >sums &&
    (setsid python3 -m http.server 8000 >/dev/null 2>&1 </dev/null &)'
until wget -q -O sums http://192.168.77.2:8000/sums 2>/dev/null; do
    blanket stats deb >/dev/null 2>&1 || fail "deb is gone"
    sleep 0.5
done
before=$(now)
for n in $(seq 1 40); do
    wget -q -O file$n http://192.168.77.2:8000/file$n &
    [ $((n % 4)) != 0 ] || wait
done
wait
md5sum -c sums >/dev/null || fail "a file did not arrive as it was"
say "40 files of 100 KB fetched from a web server in the VM, four at a time, every byte right: $(echo "$(now) $before" | awk '{ printf "%.1f", $1 - $2 }') s"
blanket net list deb
blanket stop deb --timeout 240 || fail "it does not power off"
say "powered off by its own systemd"
