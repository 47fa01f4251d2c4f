//! What the fuzzers of the shadow MMU share.

use super::guest::Guest;
use super::{Setup, World};
use blanket_abi::Gfn;
use proptest::prelude::ProptestConfig;

/// Runs for each property: `PROPTEST_CASES`, or what suits every test run.
pub fn cases(default: u32) -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|v| v.parse().ok());
    ProptestConfig {
        cases: cases.unwrap_or(default),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// A VM with two vCPUs, both on the boot root.
pub fn start(setup: Setup) -> (World, Guest) {
    let (mut w, g) = World::booted(setup);
    for id in 1..setup.vcpus {
        w.on(id, |c| {
            c.fast.kernel_mode = 1;
            c.default_info();
            c.vm.states[id as usize].set(blanket_core::vcpu::State::UP);
            let (page, cr3) = c.mmu(|mmu, m, ep| {
                let page = mmu.root_get(m, ep, Gfn(g.root), false)?;
                Ok((page, mmu.root_cr3(m, page)))
            });
            c.v.kernel_root = page;
            c.v.root_gfns[0] = Gfn(g.root);
            c.fast.kernel_cr3 = cr3;
            c.load_root();
        });
        w.start_cpu(id, &g);
    }
    (w, g)
}
