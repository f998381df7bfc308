//! Any bytes, decoded as an image within the memory that its header announces.

#![no_main]

#[path = "../../model-core/tests/common/counting.rs"]
mod counting;

use counting::{Counting, Taken, measure};
use libfuzzer_sys::fuzz_target;
use model_core::image::{DecodeLimits, Preprocess, decode_square, probe};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fuzz_target!(|bytes: &[u8]| {
    let whole = DecodeLimits { max_pixels: 1 << 20, max_bytes: 16 << 20, ..DecodeLimits::default() };
    // Whole, and at the smallest scale.
    for limits in [whole, DecodeLimits { detail: 1, ..whole }] {
        let Taken { result, peak: probing, .. } = measure(|| probe(bytes, &limits));
        assert!(probing <= 4096, "{probing} bytes to look at the header");
        let Ok(info) = result else { return };
        assert!(info.decode_bytes_upper_bound <= limits.max_bytes);
        let Taken { result, peak, .. } = measure(|| decode_square(bytes, &limits, &|| false));
        assert!(peak as u64 <= info.decode_bytes_upper_bound, "{peak} bytes, announced were {info:?}");
        if let Ok(image) = result {
            assert_eq!(Preprocess::default().pixels(&image, 32).len(), 32 * 32 * 3);
        }
    }
});
