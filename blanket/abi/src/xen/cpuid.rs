//! Xen's CPUID leaves (`public/arch-x86/cpuid.h`) and the forced-emulation prefix.

/// First Xen leaf.
pub const BASE: u32 = 0x4000_0000;
/// "XenVMMXenVMM" as ebx, ecx, edx.
pub const SIGNATURE: [u32; 3] = [0x566e_6558, 0x6558_4d4d, 0x4d4d_566e];
/// Version that is reported: 4.17.
pub const VERSION: u32 = 4 << 16 | 17;
/// `ud2a; .ascii "xen"`, followed by the instruction to emulate.
pub const EMULATE_PREFIX: [u8; 5] = [0x0f, 0x0b, 0x78, 0x65, 0x6e];
