//! Any bytes as a guest.

#[allow(dead_code)]
mod common;

use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, max_shrink_iters: 3000, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..1500)) {
        common::hostile::run(&bytes);
    }
}
