//! Whole images, with configurations as distributions write them.

mod common;

use blanket_boot::{Error, Loader};
use common::{Disk, Format, Part, Tree, bytes};

const ROOT: &str = "0b1c2d3e-4f50-4617-8293-a4b5c6d7e8f9";
const BOOT: &str = "1a2b3c4d-5e6f-4071-8293-a4b5c6d7e8f0";

fn esp(tree: Tree) -> Part {
    Part {
        row: ", type=uefi",
        mib: 40,
        format: Format::Fat("CAFE0123"),
        tree,
    }
}

fn part(mib: u64, format: Format, tree: Tree) -> Part {
    Part {
        row: "",
        mib,
        format,
        tree,
    }
}

/// One entry as 10_linux of Debian and Ubuntu writes it.
fn entry(title: &str, id: &str, path: &str, version: &str, words: &str, uuid: &str) -> String {
    format!(
        "menuentry '{title}' --class gnu-linux --class os $menuentry_id_option '{id}' {{\n\
         \trecordfail\n\tload_video\n\tgfxmode $linux_gfx_mode\n\tinsmod gzio\n\
         \tif [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi\n\
         \tinsmod part_gpt\n\tinsmod ext2\n\tset root='hd7,gpt9'\n\
         \tif [ x$feature_platform_search_hint = xy ]; then\n\
         \t  search --no-floppy --fs-uuid --set=root --hint-bios=hd0,gpt2 --hint-efi=hd0,gpt2  {uuid}\n\
         \telse\n\t  search --no-floppy --fs-uuid --set=root {uuid}\n\tfi\n\
         \techo 'Loading Linux {version} ...'\n\
         \tlinux\t{path}/vmlinuz-{version} root=UUID={ROOT} ro {words} \n\
         \tinitrd\t{path}/initrd.img-{version}\n}}\n"
    )
}

/// A grub.cfg as Debian and Ubuntu have it.
fn grub_cfg(path: &str, uuid: &str) -> String {
    let versions = ["6.8.0-41-generic", "6.8.0-40-generic"];
    let mut inner = String::new();
    for version in versions {
        let title = format!("Some Linux, with Linux {version}");
        inner += &entry(
            &title,
            &format!("gnulinux-{version}-advanced"),
            path,
            version,
            "quiet",
            uuid,
        );
        inner += &entry(
            &format!("{title} (recovery mode)"),
            &format!("gnulinux-{version}-recovery"),
            path,
            version,
            "recovery nomodeset",
            uuid,
        );
    }
    format!(
        "if [ -s $prefix/grubenv ]; then\n  set have_grubenv=true\n  load_env\nfi\n\
         if [ \"${{initrdfail}}\" = 2 ]; then\n   set initrdfail=\nfi\n\
         if [ \"${{next_entry}}\" ] ; then\n   set default=\"${{next_entry}}\"\n   set next_entry=\n\
         \x20  save_env next_entry\n   set boot_once=true\nelse\n   set default=\"${{saved_entry}}\"\nfi\n\
         if [ x\"${{feature_menuentry_id}}\" = xy ]; then\n  menuentry_id_option=\"--id\"\nelse\n\
         \x20 menuentry_id_option=\"\"\nfi\nexport menuentry_id_option\n\
         function recordfail {{\n  set recordfail=1\n  if [ -n \"${{have_grubenv}}\" ]; then if [ -z \
         \"${{boot_once}}\" ]; then save_env recordfail; fi; fi\n}}\n\
         function load_video {{\n  insmod all_video\n}}\nfunction gfxmode {{\n\tset gfxpayload=\"${{1}}\"\n}}\n\
         terminal_output gfxterm\n{}submenu 'Advanced options' $menuentry_id_option 'gnulinux-advanced' {{\n{inner}}}\n\
         menuentry 'UEFI Firmware Settings' $menuentry_id_option 'uefi-firmware' {{\n\tfwsetup\n}}\n\
         if [ -f  ${{config_directory}}/custom.cfg ]; then\n  source ${{config_directory}}/custom.cfg\nfi\n",
        entry(
            "Some Linux",
            "gnulinux-simple",
            path,
            versions[0],
            "quiet splash",
            uuid
        )
    )
}

fn kernels(path: &str, length: usize) -> Tree {
    ["6.8.0-41-generic", "6.8.0-40-generic"]
        .iter()
        .fold(Tree::default(), |tree, version| {
            tree.file(&format!("{path}/vmlinuz-{version}"), bytes(version, length))
                .file(&format!("{path}/initrd.img-{version}"), bytes(path, 70_003))
        })
}

fn grubenv(variables: &str) -> String {
    format!("# GRUB Environment Block\n{variables}\n{}", "#".repeat(900))
}

#[test]
fn debian_on_ext4() {
    let disk = Disk::new(
        "gpt",
        &[
            esp(Tree::default().file("/EFI/debian/grub.cfg", "configfile x\n")),
            part(
                60,
                Format::Ext4(ROOT),
                kernels("/boot", 9_000_001).file("/boot/grub/grub.cfg", grub_cfg("/boot", ROOT)),
            ),
        ],
    );
    let mut image = disk.open().unwrap();
    let menu = image.menu().unwrap();
    assert_eq!((menu.loader, menu.entries.len()), (Loader::Grub, 5));
    assert_eq!(menu.config, "partition 2 (ext4): /boot/grub/grub.cfg");
    let default = menu.pick(None).unwrap();
    assert_eq!(default.id, "gnulinux-simple");
    assert_eq!(
        default.cmdline,
        format!("BOOT_IMAGE=/boot/vmlinuz-6.8.0-41-generic root=UUID={ROOT} ro quiet splash")
    );
    let loaded = image.load(default).unwrap();
    assert_eq!(loaded.kernel, bytes("6.8.0-41-generic", 9_000_001));
    assert_eq!(loaded.initrd[..70_003], bytes("/boot", 70_003));
    assert_eq!(loaded.initrd.len(), 70_004);
    // By version, by number, by title; and what is there is said when there is no such entry.
    assert_eq!(
        menu.pick(Some("6.8.0-40")).unwrap().id,
        "gnulinux-advanced>gnulinux-6.8.0-40-generic-advanced"
    );
    assert_eq!(menu.pick(Some("4")).unwrap(), &menu.entries[4]);
    assert!(
        menu.pick(Some("gnulinux-6.8.0-41-generic-recovery"))
            .unwrap()
            .cmdline
            .ends_with("nomodeset")
    );
    let error = menu.pick(Some("5.4")).unwrap_err().to_string();
    assert!(
        error.contains("\"5.4\"") && error.contains("Advanced options>Some Linux"),
        "{error}"
    );
}

#[test]
fn ubuntu_with_boot_on_a_partition_of_its_own() {
    for (saved, expected) in [
        (
            "saved_entry=gnulinux-advanced>gnulinux-6.8.0-40-generic-advanced",
            "gnulinux-6.8.0-40-generic-advanced",
        ),
        ("saved_entry=1>2", "gnulinux-6.8.0-40-generic-advanced"),
        (
            "saved_entry=gnulinux-advanced",
            "gnulinux-6.8.0-41-generic-advanced",
        ),
        ("saved_entry=not there", "gnulinux-simple"),
        ("next_entry=1>1", "gnulinux-6.8.0-41-generic-recovery"),
    ] {
        let boot = kernels("", 100_001)
            .link("/vmlinuz", "vmlinuz-6.8.0-41-generic")
            .file("/grub/grub.cfg", grub_cfg("", BOOT))
            .file("/grub/grubenv", grubenv(saved));
        let root = Tree::default().link("/vmlinuz", "boot/vmlinuz-6.8.0-41-generic");
        let disk = Disk::new(
            "gpt",
            &[
                part(8, Format::Ext4(ROOT), root),
                esp(Tree::default()),
                part(12, Format::Ext4(BOOT), boot),
            ],
        );
        let mut image = disk.open().unwrap();
        let menu = image.menu().unwrap();
        let default = menu.pick(None).unwrap();
        assert_eq!(default.id.rsplit('>').next(), Some(expected), "{saved}");
        assert_eq!(
            menu.notes.len(),
            usize::from(saved.starts_with("next")),
            "{:?}",
            menu.notes
        );
        let version = default.kernel().trim_start_matches("/vmlinuz-").to_owned();
        assert_eq!(
            image.load(default).unwrap().kernel,
            bytes(&version, 100_001)
        );
    }
}

#[test]
fn fedora_with_entry_files_and_xfs() {
    let id = "0123456789abcdef0123456789abcdef";
    let conf = |version: &str| {
        format!(
            "title Fedora Linux ({version})\nversion {version}\nlinux /vmlinuz-{version}\n\
             initrd /initramfs-{version}.img $tuned_initrd\n\
             options root=UUID={ROOT} ro rootflags=subvol=root $kernelopts $tuned_params\n\
             grub_users $grub_users\ngrub_arg --unrestricted\ngrub_class fedora\n"
        )
    };
    let cfg = format!(
        "set pager=1\nif [ -f ${{config_directory}}/grubenv ]; then\n  load_env -f ${{config_directory}}/grubenv\n\
         elif [ -s $prefix/grubenv ]; then\n  load_env\nfi\n\
         if [ \"${{next_entry}}\" ] ; then\n   set default=\"${{next_entry}}\"\nelse\n   set default=\"${{saved_entry}}\"\nfi\n\
         if [ $? = 0 ]; then true; fi\n\
         search --no-floppy --fs-uuid --set=boot {BOOT}\n\
         if [ -z \"${{kernelopts}}\" ]; then\n  set kernelopts=\"mitigations=off\"\nfi\n\
         insmod increment\ninsmod blscfg\nblscfg\n"
    );
    for (saved, expected) in [
        ("", "6.10.3-200"),
        (
            "saved_entry=0123456789abcdef0123456789abcdef-6.9.12-200",
            "6.9.12-200",
        ),
        ("kernelopts=from=env", "6.10.3-200"),
    ] {
        let mut boot = Tree::default()
            .file("/grub2/grub.cfg", &cfg)
            .file("/grub2/grubenv", grubenv(saved));
        for version in ["6.9.12-200", "6.10.3-200", "0-rescue"] {
            boot = boot
                .file(
                    &format!("/loader/entries/{id}-{version}.conf"),
                    conf(version),
                )
                .file(&format!("/vmlinuz-{version}"), bytes(version, 300_000))
                .file(
                    &format!("/initramfs-{version}.img"),
                    bytes(version, 5_000_003),
                );
        }
        let disk = Disk::new(
            "gpt",
            &[
                esp(Tree::default().file("/EFI/fedora/grub.cfg", "x")),
                part(320, Format::Xfs(BOOT), boot),
                part(
                    130,
                    Format::Btrfs(ROOT),
                    Tree::default().file("/root/etc/fstab", ""),
                ),
            ],
        );
        let mut image = disk.open().unwrap();
        let menu = image.menu().unwrap();
        assert_eq!(menu.entries.len(), 3);
        assert_eq!(menu.entries[2].kernel(), "/vmlinuz-0-rescue");
        let default = menu.pick(None).unwrap();
        assert_eq!(default.kernel(), format!("/vmlinuz-{expected}"), "{saved}");
        let kernelopts = if saved.starts_with("kernelopts") {
            "from=env"
        } else {
            "mitigations=off"
        };
        assert_eq!(
            default.cmdline,
            format!(
                "BOOT_IMAGE=(hd0,gpt2)/vmlinuz-{expected} root=UUID={ROOT} ro rootflags=subvol=root {kernelopts}"
            )
        );
        let loaded = image.load(default).unwrap();
        assert_eq!(loaded.kernel, bytes(expected, 300_000));
        assert_eq!(loaded.initrd[..5_000_003], bytes(expected, 5_000_003));
    }
}

#[test]
fn centos_with_its_configuration_on_the_esp() {
    let cfg = format!(
        "set default=\"0\"\nmenuentry 'CentOS' --unrestricted {{\n\tset root='hd0,msdos9'\n\
         \tsearch --no-floppy --set=root --fs-uuid {BOOT}\n\tlinuxefi /vmlinuz root=/dev/mapper/cl-root ro\n\
         \tinitrdefi /initramfs.img\n}}\n"
    );
    let boot = Tree::default()
        .file("/vmlinuz", bytes("v", 100_000))
        .file("/initramfs.img", bytes("i", 100_000));
    let disk = Disk::new(
        "dos",
        &[
            esp(Tree::default().file("/EFI/centos/grub.cfg", cfg)),
            part(12, Format::Ext4(BOOT), boot),
            part(8, Format::Raw(512 + 24, b"LVM2 001"), Tree::default()),
        ],
    );
    let mut image = disk.open().unwrap();
    let menu = image.menu().unwrap();
    assert_eq!(menu.config, "partition 1 (FAT): /EFI/centos/grub.cfg");
    let default = menu.pick(None).unwrap();
    assert_eq!(
        default.cmdline,
        "BOOT_IMAGE=/vmlinuz root=/dev/mapper/cl-root ro"
    );
    assert_eq!(image.load(default).unwrap().kernel, bytes("v", 100_000));
}

#[test]
fn arch_with_systemd_boot() {
    let conf = |kernel: &str| {
        format!(
            "title Arch Linux ({kernel})\nlinux /vmlinuz-{kernel}\ninitrd /amd-ucode.img\ninitrd /initramfs-{kernel}.img\noptions root=PARTUUID=x rw\noptions quiet\n"
        )
    };
    let tree = Tree::default()
        .file("/loader/loader.conf", "timeout 3\ndefault arch-lts*\n")
        .file("/loader/entries/arch.conf", conf("linux"))
        .file("/loader/entries/arch-lts.conf", conf("linux-lts"))
        .file(
            "/loader/entries/shell.conf",
            "title Shell\nefi /shellx64.efi\n",
        )
        .file("/amd-ucode.img", bytes("ucode", 1001))
        .file("/vmlinuz-linux", bytes("linux", 200_000))
        .file("/vmlinuz-linux-lts", bytes("lts", 200_000))
        .file("/initramfs-linux.img", bytes("i", 3_000))
        .file("/initramfs-linux-lts.img", bytes("j", 3_001));
    let disk = Disk::new(
        "gpt",
        &[esp(tree), part(20, Format::Ext4(ROOT), Tree::default())],
    );
    let mut image = disk.open().unwrap();
    let menu = image.menu().unwrap();
    assert_eq!((menu.loader, menu.entries.len()), (Loader::Bls, 2));
    let default = menu.pick(None).unwrap();
    assert_eq!(default.title, "Arch Linux (linux-lts)");
    assert_eq!(default.cmdline, "root=PARTUUID=x rw quiet");
    let loaded = image.load(default).unwrap();
    assert_eq!(loaded.kernel, bytes("lts", 200_000));
    assert_eq!(loaded.initrd[..1001], bytes("ucode", 1001));
    assert_eq!(loaded.initrd[1001..1004], [0; 3]);
    assert_eq!(loaded.initrd[1004..4005], bytes("j", 3001));
    assert_eq!(menu.pick(Some("arch")).unwrap().kernel(), "/vmlinuz-linux");
}

#[test]
fn suse_on_btrfs_in_a_logical_partition() {
    let cfg = format!(
        "set btrfs_relative_path=\"yes\"\nexport btrfs_relative_path\nif [ -f ${{config_directory}}/grubenv ]; then\n\
         \x20 load_env -f ${{config_directory}}/grubenv\nfi\nset default=\"${{saved_entry}}\"\n\
         function load_video {{\n  if [ x$feature_all_video_module = xy ]; then\n    insmod all_video\n  fi\n}}\n\
         menuentry 'openSUSE Leap 15.6'  --class opensuse $menuentry_id_option 'gnulinux-simple-{ROOT}' {{\n\
         \tload_video\n\tset root='hd0,msdos5'\n\
         \tsearch --no-floppy --fs-uuid --set=root --hint-bios=hd0,msdos5 {ROOT}\n\
         \techo 'Loading'\n\tlinux /boot/vmlinuz-6.4.0-default root=UUID={ROOT} splash=silent \"quoted=a b\" mitigations=auto\n\
         \tinitrd /boot/initrd-6.4.0-default\n}}\n"
    );
    let tree = Tree::default()
        .file("/boot/grub2/grub.cfg", cfg)
        .file(
            "/usr/lib/modules/6.4.0-default/vmlinuz",
            bytes("suse", 2_000_000),
        )
        .link(
            "/boot/vmlinuz-6.4.0-default",
            "../usr/lib/modules/6.4.0-default/vmlinuz",
        )
        .file("/boot/initrd-6.4.0-default", bytes("initrd", 4_000_000));
    let disk = Disk::new(
        "dos",
        &[
            part(8, Format::Raw(4086, b"SWAPSPACE2"), Tree::default()),
            Part {
                row: "logical",
                mib: 20,
                format: Format::Ext4(BOOT),
                tree: Tree::default(),
            },
            Part {
                row: "logical",
                mib: 140,
                format: Format::Btrfs(ROOT),
                tree,
            },
        ],
    );
    let mut image = disk.open().unwrap();
    let menu = image.menu().unwrap();
    assert_eq!(menu.config, "partition 6 (btrfs): /boot/grub2/grub.cfg");
    let default = menu.pick(None).unwrap();
    assert_eq!(
        default.cmdline,
        format!(
            "BOOT_IMAGE=/boot/vmlinuz-6.4.0-default root=UUID={ROOT} splash=silent \"quoted=a b\" mitigations=auto"
        )
    );
    let loaded = image.load(default).unwrap();
    assert_eq!(loaded.kernel, bytes("suse", 2_000_000));
    assert_eq!(loaded.initrd, bytes("initrd", 4_000_000));
}

#[test]
fn alpine_with_extlinux_and_no_partitions() {
    let tree = Tree::default()
        .file("/boot/extlinux.conf", "DEFAULT menu.c32\nPROMPT 0\nLABEL virt\n  MENU DEFAULT\n  MENU LABEL Linux virt\n  LINUX vmlinuz-virt\n  INITRD initramfs-virt\n  APPEND root=UUID=x modules=ext4 quiet\n")
        .file("/boot/vmlinuz-virt", bytes("virt", 100_000))
        .file("/boot/initramfs-virt", bytes("init", 100_000));
    let disk = Disk::new("", &[part(20, Format::Ext4(ROOT), tree)]);
    let mut image = disk.open().unwrap();
    let menu = image.menu().unwrap();
    assert_eq!(menu.loader, Loader::Extlinux);
    let default = menu.pick(None).unwrap();
    assert_eq!(
        default.cmdline,
        "BOOT_IMAGE=vmlinuz-virt root=UUID=x modules=ext4 quiet"
    );
    assert_eq!(image.load(default).unwrap().kernel, bytes("virt", 100_000));
}

#[test]
fn what_cannot_be_booted_is_said() {
    // Everything on LVM.
    let disk = Disk::new(
        "gpt",
        &[part(8, Format::Raw(512 + 24, b"LVM2 001"), Tree::default())],
    );
    let error = disk.open().unwrap_err().to_string();
    assert!(
        error.contains("partition 1 is an LVM physical volume") && error.contains("--kernel"),
        "{error}"
    );
    // Nothing that boots.
    let disk = Disk::new(
        "gpt",
        &[
            part(10, Format::Ext4(ROOT), Tree::default().file("/data", "x")),
            part(8, Format::Raw(0, b"LUKS\xba\xbe"), Tree::default()),
        ],
    );
    let error = disk.open().unwrap().menu().unwrap_err();
    assert!(matches!(error, Error::NoConfiguration { .. }));
    let error = error.to_string();
    assert!(
        error.contains("partition 1 (ext4)") && error.contains("LUKS"),
        "{error}"
    );
    // The kernel is gone, or in a circle of links, or on another disk.
    for (tree, words) in [
        (Tree::default(), "it is not there"),
        (Tree::default().link("/k", "l").link("/l", "k"), "circle"),
        (Tree::default().file("/k/x", ""), "no regular file"),
    ] {
        let tree = tree.file("/boot/grub/grub.cfg", "menuentry a { linux /k\n }");
        let disk = Disk::new("gpt", &[part(10, Format::Ext4(ROOT), tree)]);
        let mut image = disk.open().unwrap();
        let menu = image.menu().unwrap();
        let error = image
            .load(menu.pick(None).unwrap())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("partition 1 (ext4)") && error.contains("/k") && error.contains(words),
            "{error}"
        );
    }
    let cfg = "menuentry w { chainloader +1\n }\nmenuentry a { set root=hd1,gpt1\n linux /k }";
    let tree = Tree::default().file("/boot/grub/grub.cfg", cfg);
    let disk = Disk::new("gpt", &[part(10, Format::Ext4(ROOT), tree)]);
    let mut image = disk.open().unwrap();
    let menu = image.menu().unwrap();
    let error = menu.pick(None).unwrap_err().to_string();
    assert!(
        error.contains("starts no Linux") && error.contains("0: a"),
        "{error}"
    );
    let error = image
        .load(menu.pick(Some("a")).unwrap())
        .unwrap_err()
        .to_string();
    assert!(error.contains("(hd1,gpt1)"), "{error}");
    // Broken, or nothing but others.
    for (cfg, words) in [
        ("menuentry a {\n", "line 2"),
        ("menuentry w { chainloader +1\n}", "chainloader"),
    ] {
        let tree = Tree::default().file("/boot/grub/grub.cfg", cfg);
        let disk = Disk::new("gpt", &[part(10, Format::Ext4(ROOT), tree)]);
        let error = disk.open().unwrap().menu().unwrap_err().to_string();
        assert!(
            error.contains(words) && error.contains("/boot/grub/grub.cfg"),
            "{error}"
        );
    }
}
