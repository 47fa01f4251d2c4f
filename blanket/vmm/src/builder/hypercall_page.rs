//! The hypercall page of kernels that do not issue `syscall` themselves
//! (`xen/arch/x86/pv/hypercall.c`, `pv_ring3_init_hypercall_page`).

/// Bytes of a stub.
const STUB: usize = 32;
/// The iret hypercall: its stub builds the first words of the iret frame.
const IRET: u32 = 23;

/// 128 stubs; stub *n* makes hypercall *n*.
pub fn contents() -> Vec<u8> {
    // Traps where no stub is.
    let mut page = vec![0xcc; 128 * STUB];
    for (number, stub) in (0u32..).zip(page.chunks_exact_mut(STUB)) {
        let [a, b, c, d] = number.to_le_bytes();
        if number == IRET {
            // push rcx; push r11; push rax; mov eax, 23; syscall
            let code = [0x51, 0x41, 0x53, 0x50, 0xb8, a, b, c, d, 0x0f, 0x05];
            stub[..code.len()].copy_from_slice(&code);
        } else {
            // push rcx; push r11; mov eax, n; syscall; pop r11; pop rcx; ret
            let code = [
                0x51, 0x41, 0x53, 0xb8, a, b, c, d, 0x0f, 0x05, 0x41, 0x5b, 0x59, 0xc3,
            ];
            stub[..code.len()].copy_from_slice(&code);
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_has_its_number() {
        let page = contents();
        assert_eq!(page.len(), 4096);
        for (number, stub) in page.chunks_exact(STUB).enumerate() {
            let at = stub.iter().position(|&b| b == 0xb8).expect("mov eax");
            let imm = u32::from_le_bytes(stub[at + 1..at + 5].try_into().expect("4 bytes"));
            assert_eq!(imm as usize, number);
            assert_eq!(&stub[at + 5..at + 7], &[0x0f, 0x05]);
        }
        // The iret stub must not return; all others must.
        assert!(!page[23 * STUB..24 * STUB].contains(&0xc3));
        assert_eq!(page.iter().filter(|&&b| b == 0xc3).count(), 127);
    }
}
