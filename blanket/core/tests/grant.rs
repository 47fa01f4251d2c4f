//! Grant table: the guest's hypercalls.

use blanket_abi::Gfn;
use blanket_abi::xen::domid::{BACKEND, GUEST, SELF};
use blanket_abi::xen::errno::{EINVAL, ENOSYS, EPERM, ESRCH};
use blanket_abi::xen::grant::{op, status};
use blanket_core::grant::{GrantTable, PERMISSION_DENIED, Refusal};
use proptest::prelude::*;

#[test]
fn a_linux_guest_sets_up_its_table() {
    let mut t = GrantTable::new(0x10001, 32);
    assert_eq!(t.set_version(1), Ok(()));
    assert_eq!(t.query_size(SELF), Ok((1, 32)));
    assert_eq!(t.setup(SELF, 1), Ok(()));
    assert_eq!(t.frame(0), Some(Gfn(0x10001)));
    assert_eq!(t.frame(1), None);
    assert_eq!(t.setup(GUEST, 4), Ok(()));
    assert_eq!(t.frame(3), Some(Gfn(0x10004)));
    assert_eq!(t.nr_entries(), 4 * 512);
    assert_eq!(
        t.setup(SELF, 2),
        Ok(()),
        "all frames again, and it does not shrink"
    );
    assert_eq!(t.nr_frames(), 4);
    assert_eq!(t.get_version(SELF), Ok(1));
}

#[test]
fn refusals() {
    let mut t = GrantTable::new(100, 4);
    assert_eq!(t.setup(SELF, 5), Err(status::GENERAL_ERROR));
    assert_eq!(t.setup(BACKEND, 1), Err(PERMISSION_DENIED));
    assert_eq!(t.setup(9, 1), Err(status::BAD_DOMAIN));
    assert_eq!(t.query_size(9), Err(status::BAD_DOMAIN));
    assert_eq!(t.set_version(2), Err(ENOSYS));
    assert_eq!(t.set_version(0), Err(EINVAL));
    assert_eq!(t.get_version(BACKEND), Err(EPERM));
    assert_eq!(t.get_version(9), Err(ESRCH));
    for cmd in [op::DUMP, op::SWAP_REF, op::CACHE_FLUSH, 13, u64::MAX] {
        assert_eq!(GrantTable::refuse(cmd), Refusal::Call(ENOSYS));
    }
    for cmd in [
        op::MAP,
        op::UNMAP,
        op::TRANSFER,
        op::COPY,
        7,
        op::GET_STATUS_FRAMES,
    ] {
        let Refusal::Each {
            size,
            status_at,
            status,
        } = GrantTable::refuse(cmd)
        else {
            panic!("operation {cmd}");
        };
        assert!(
            status < 0 && status_at + 2 <= size && size % 8 == 0,
            "operation {cmd}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 4000, failure_persistence: None, ..ProptestConfig::default()
    })]

    #[test]
    fn setup_never_leaves_the_reserved_frames(
        base in 0u64..1 << 24, max in any::<u32>(), sizes in prop::collection::vec(any::<u32>(), 1..20),
    ) {
        let max = max % 64;
        let mut t = GrantTable::new(base, u64::from(max));
        let mut largest = 1;
        for n in sizes {
            for n in [n, n % 80] {
                if t.setup(SELF, n).is_ok() {
                    prop_assert!(n <= max.max(1));
                    largest = largest.max(n);
                }
                prop_assert_eq!(t.nr_frames(), largest);
                prop_assert_eq!(t.frame(largest - 1), Some(Gfn(base + u64::from(largest) - 1)));
                prop_assert_eq!(t.frame(largest), None);
            }
        }
    }
}
