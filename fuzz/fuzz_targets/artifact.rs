//! Any bytes, read as a backbone and as an expert set, within what the header announces.

#![no_main]

#[path = "../../model-core/tests/common/counting.rs"]
mod counting;

use counting::{Counting, measure};
use libfuzzer_sys::fuzz_target;
use model_core::artifact::{Header, read_backbone, read_expert_set};
use model_core::footprint::loading_bytes;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Most bytes that parsing a header takes for each byte of it: a value of a document may be two bytes long.
const HEADER_FACTOR: usize = 128;

fuzz_target!(|bytes: &[u8]| {
    let header = measure(|| Header::from_bytes(bytes));
    let parsing = bytes.len() * HEADER_FACTOR + (64 << 10);
    assert!(header.peak <= parsing, "{} bytes for the header of {} bytes", header.peak, bytes.len());
    // What is refused by its header takes no more than that; what is read, no more than was announced beside it.
    let announced = header.result.map_or(0, |header| loading_bytes(&header.contents, header.file_bytes));
    let bound = parsing + usize::try_from(announced).unwrap_or(usize::MAX);
    let peaks = [measure(|| drop(read_backbone(bytes))).peak, measure(|| drop(read_expert_set(bytes))).peak];
    assert!(peaks.iter().all(|&peak| peak <= bound), "{peaks:?} bytes, {bound} announced");
});
