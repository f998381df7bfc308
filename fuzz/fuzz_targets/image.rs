//! Any bytes, decoded as an image within a bound on memory.

#![no_main]

use libfuzzer_sys::fuzz_target;
use model_core::image::{DecodeLimits, Preprocess, decode, probe};

fuzz_target!(|bytes: &[u8]| {
    let whole = DecodeLimits { max_pixels: 1 << 20, max_bytes: 16 << 20, ..DecodeLimits::default() };
    // Whole, and at the smallest scale, which other decoders see to.
    for limits in [whole, DecodeLimits { detail: 1, ..whole }] {
        let Ok(info) = probe(bytes, &limits) else { return };
        assert!(info.decode_bytes_upper_bound <= limits.max_bytes);
        if let Ok(image) = decode(bytes, &limits) {
            assert_eq!(Preprocess::default().pixels(&image, 32).len(), 32 * 32 * 3);
        }
    }
});
