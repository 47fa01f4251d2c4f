# A whole Debian as a VM: out of its own image, with what is in it.
blanket disk create --backing /dev/vdb --backing-format raw disk.qcow2 || fail "no overlay"
boot disk.qcow2,backing=/dev
running
echo "ok: running, kernel $(in_vm uname -r), $(in_vm cat /sys/hypervisor/type)"
[ "$(in_vm hostname)" = deb ] || fail "the host name is not the VM's"
in_vm findmnt -n -o SOURCE / | grep -q /dev/xvda1 || fail "another root"

# The other network: an address by DHCP, and a port of this machine's.
to=$(ssh $OPTIONS -p 2222 user@127.0.0.1 'echo $SSH_CONNECTION') || fail "no way in by user mode"
echo "ok: in by user mode: $to"
ping -c 1 -W 10 fd77::2 >/dev/null || fail "no IPv6"

# What goes through arrives as it was.
dd if=/dev/urandom of=data bs=1M count=4 2>/dev/null
sum=$(md5sum <data)
[ "$(in_vm 'tee data | md5sum' <data)" = "$sum" ] || fail "other bytes arrive in the VM"
[ "$(in_vm cat data | md5sum)" = "$sum" ] || fail "other bytes come back"

# Containers and packet filters.
[ "$(in_vm sudo unshare --mount --pid --net --fork --mount-proc sh -c "'echo \$\$'")" = 1 ] || fail "no container"
in_vm sudo nft -f - <<'N' || fail "no nftables"
table inet blanket { chain in { type filter hook input priority 0; tcp dport 9999 counter drop; }; }
N
in_vm sudo nft list table inet blanket | grep -q 'dport 9999' || fail "the rule is not there"

# A disk that comes, grows, goes, and comes again with what was written.
blanket disk create --format raw --size 32M data.raw || fail "no image"
[ "$(blanket disk attach deb data.raw)" = xvdc ] || fail "not attached as xvdc"
in_vm 'until [ -b /dev/xvdc ]; do sleep 0.2; done; sudo mkfs.ext4 -q /dev/xvdc && sudo mount /dev/xvdc /mnt &&
    sudo cp data /mnt && sudo sync' || fail "the new disk does not work"
blanket disk resize deb xvdc --size 48M || fail "no resize"
in_vm 'until [ "$(lsblk -bndo SIZE /dev/xvdc)" = 50331648 ]; do sleep 0.2; done; sudo resize2fs /dev/xvdc 2>/dev/null' ||
    fail "the new size is not seen"
in_vm sudo umount /mnt
blanket disk detach deb xvdc || fail "not detached"
! blanket disk detach deb xvdc 2>err || fail "detached twice"
grep -q 'no disk xvdc' err || fail "no word about it: $(cat err)"
in_vm 'until [ ! -e /dev/xvdc ]; do sleep 0.2; done'
blanket disk attach deb data.raw >/dev/null || fail "not again"
in_vm 'until [ -b /dev/xvdc ]; do sleep 0.2; done; sudo mount -o ro /dev/xvdc /mnt' || fail "not mounted again"
[ "$(in_vm md5sum /mnt/data | cut -d' ' -f1)" = "${sum%% *}" ] || fail "the data are not the same"
in_vm sudo umount /mnt
blanket disk detach deb xvdc || fail "not detached"

# Nobody else can have its image.
! blanket run disk.qcow2,backing=/dev --name two 2>err || fail "two VMs on one image"
grep -q 'in use' err || fail "no word about it: $(cat err)"
! blanket run --net tap=nosuch --disk data.raw --name two 2>err || fail "a tap that is not there"
grep -q nosuch err || fail "no word about the tap: $(cat err)"

blanket disk list deb
blanket net list deb
blanket stop deb --timeout 240 || fail "it does not power off"
tail -n 40 deb.log | tr -d '\r' | grep -qE 'System halted|Power down' || fail "it did not power itself off"
echo DEBIAN-OK
