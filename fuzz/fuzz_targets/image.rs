//! Any bytes, decoded as an image within the memory that its header announces.

#![no_main]

#[path = "../../model-core/tests/common/counting.rs"]
mod counting;

use counting::{Counting, Taken, measure};
use libfuzzer_sys::fuzz_target;
use model_core::image::{Crop, DecodeLimits, Fit, Preprocess, decode_picture, probe};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fuzz_target!(|bytes: &[u8]| {
    let whole = DecodeLimits { max_pixels: 1 << 20, max_bytes: 16 << 20, ..DecodeLimits::default() };
    // Whole, and at the smallest scale.
    for limits in [whole, DecodeLimits { detail: 1, ..whole }] {
        let Taken { result, peak: probing, .. } = measure(|| probe(bytes, &limits));
        // What is no image is read as text: 1,024 bytes, three for each that is no UTF-8, in a buffer that doubles as it
        // grows, and once more in lower case. Headers of images take less.
        assert!(probing <= 12 << 10, "{probing} bytes to look at the header");
        let Ok(info) = result else { return };
        assert!(info.decode_bytes_upper_bound <= limits.max_bytes);
        let Taken { result, peak, .. } = measure(|| decode_picture(bytes, &limits, &|| false));
        assert!(peak as u64 <= info.decode_bytes_upper_bound, "{peak} bytes, announced were {info:?}");
        let Ok(picture) = result else { continue };
        for fit in [Fit::Crop, Fit::Pad, Fit::Stretch] {
            if let Ok(sight) = Preprocess::default().see(&picture, (Crop::default(), fit), 32) {
                assert_eq!(sight.samples.len(), 32 * 32 * 3);
            }
        }
    }
});
