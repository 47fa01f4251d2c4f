//! The core image: header, nothing else. The code is in `blanket-core` (logic)
//! and `blanket-hal` (everything unsafe).
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod header {
    use blanket_abi::device::{API_VERSION, IMAGE_MAGIC, Switch};
    use blanket_hal as _;
    use core::arch::global_asm;

    // `blanket_abi::device::ImageHeader`, filled in by the linker.
    global_asm!(
        r#"
        .section .header, "a"
        .quad {MAGIC}
        .long {API}
        .long {SWITCH}
        .quad blanket_entry_start - {BASE}
        .quad blanket_entry_end - {BASE}
        .quad blanket_text_end - {BASE}
        .quad blanket_rodata_end - {BASE}
        .quad blanket_data_end - {BASE}
        .quad blanket_file_end - {BASE}
        .quad blanket_start - {BASE}
        .quad blanket_idt - {BASE}
        .quad blanket_stubs - {BASE}
        .quad blanket_smap - {BASE}
        .quad blanket_smap_end - {BASE}
        .quad blanket_isolate - {BASE}
        .quad blanket_isolate_end - {BASE}
        .text
        "#,
        MAGIC = const IMAGE_MAGIC,
        API = const API_VERSION,
        SWITCH = const size_of::<Switch>(),
        BASE = const blanket_abi::layout::IMAGE,
    );
}

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("blanket-image is the freestanding core; build it with `cargo xtask build`");
    std::process::exit(2);
}
