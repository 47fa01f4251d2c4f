//! A whole Debian as an instance: the lab's init starts the system of the image that is the
//! instance's second disk ([`crate::debian`]), and that system's systemd runs the command.
//!
//! The kernel is the lab's, as for all instances; nothing of the image is changed but what the
//! lab adds, and the disk forgets it (QEMU's `snapshot=on`).

/// Drivers of the disk's file system.
pub const MODULES: &[&str] = &["crc32c_generic", "ext4"];

/// For the kernel's command line. An emulated machine has no time for what no case asks
/// about: cloud-init, host keys, a network that is not there, Debian's mirrors. The EFI system
/// partition needs a module of the image's own kernel, which may be another one.
pub const APPEND: &str = "cloud-init=disabled systemd.default_timeout_start_sec=1500 \
    systemd.mask=boot-efi.mount systemd.mask=ssh.service \
    systemd.mask=systemd-networkd-wait-online.service systemd.mask=apt-daily.timer \
    systemd.mask=apt-daily-upgrade.timer systemd.mask=e2scrub_all.timer \
    systemd.mask=e2scrub_reap.service systemd.mask=fstrim.timer systemd.mask=dpkg-db-backup.timer";

/// Part of init (`lab/hand-over`), before it has mounted anything. The unit and what is mounted
/// at `/run` stay: systemd leaves mounts alone that are there.
pub const HAND_OVER: &str = r#"
mount -t devtmpfs dev /dev
for module in $(cat /lab/modules); do insmod $module; done
mkdir -p /new
if ! mount -t ext4 /dev/vdb1 /new; then
    echo "there is no system on /dev/vdb1" >/dev/console
    poweroff -f
fi
cp -a /lab /guest /tests /new/
for program in /bin/*; do
    case $program in
    /bin/busybox) ;;
    *) [ -L $program ] || cp $program /new/usr/local/bin/ ;;
    esac
done
mount -t tmpfs -o mode=755 run /new/run
units=/new/run/systemd/system
mkdir -p $units/multi-user.target.wants
cat >$units/lab.service <<U
[Unit]
Description=the lab's command
Wants=systemd-logind.service
After=dbus.service systemd-logind.service systemd-user-sessions.service
SuccessAction=poweroff-force
FailureAction=poweroff-force
[Service]
Type=oneshot
Environment=HOME=/root LAB_NODE=$LAB_NODE LAB_NONCE=$LAB_NONCE
WorkingDirectory=/root
ExecStartPre=/bin/sh -c '! [ -e /lab/blanket.ko ] || insmod /lab/blanket.ko'
ExecStart=/bin/sh /lab/run
U
ln -s ../lab.service $units/multi-user.target.wants/lab.service
mount --move /dev /new/dev
exec switch_root /new /sbin/init
"#;
