//! A damaged artifact is refused or loads to valid values; it never panics, and never makes the reader allocate more
//! than the file justifies. A binary of its own, because it counts allocations.

mod common;
#[path = "common/counting.rs"]
mod counting;

use std::sync::Mutex;

use common::{Files, files, minute_config};
use counting::{Counting, measure};
use model_core::artifact::{read_backbone, read_expert_set};
use model_core::config::FloatFormat;
use model_core::projection::Projection;
use model_core::random::SplitMix64;
use model_core::weights::{Covariance, Familiarity, Int4Rows, Matrix, Precision, Rows};
use proptest::prelude::*;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One test at a time: the counters are shared.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Most a reader may hold per byte of file. Tensors grow at most fourfold (two-bit codes become bytes); the worst is
/// JSON whose every third byte starts an empty array, which was seen to take 78.
const BYTES_PER_FILE_BYTE: usize = 96;

/// Reads `bytes` as either kind; `true` when one of them loads. Whatever loads is finite by `ArtifactError::Value`.
fn reads(bytes: &[u8]) -> bool {
    let taken = measure(|| (read_backbone(bytes), read_expert_set(bytes)));
    let ((backbone, set), peak) = (taken.result, taken.peak);
    let allowed = 4096 + BYTES_PER_FILE_BYTE * bytes.len();
    assert!(peak <= allowed, "{peak} bytes allocated for a file of {}", bytes.len());
    if let Ok(set) = &set {
        assert!(set.weights.head.weight.to_f32().iter().chain(&set.weights.head.bias).all(|v| v.is_finite()));
    }
    backbone.is_ok() || set.is_ok()
}

/// Small files of both kinds and versions, with every encoding and every optional part.
fn samples() -> Vec<Vec<u8>> {
    let Files { backbone, expert_set } = files(&minute_config(), 7);
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/artifacts");
    let recipe = ["v1_backbone", "v1_set", "v2_backbone", "v2_set", "v2_borrower", "v2_seeded"];
    let recipe = recipe.map(|name| std::fs::read(folder.join(format!("{name}.safetensors"))).unwrap());
    let folded = folded(&recipe[3]);
    [backbone, expert_set, folded].into_iter().chain(recipe).collect()
}

/// The set with a head and four-bit statistics of fewer features than its backbone has.
fn folded(set: &[u8]) -> Vec<u8> {
    let (mut artifact, features) = (read_expert_set(set).unwrap(), 5);
    let (weights, mut random) = (&mut artifact.weights, SplitMix64::at(5, 0));
    let classes = weights.labels.len();
    let head = random.uniforms(classes * features, 1.0);
    weights.head.weight = Matrix::encode(&head, classes, Precision::Int8);
    weights.projection = Some(Projection::Folded { features });
    let mut rows = |count: usize| Int4Rows::encode(&random.uniforms(count * features, 1.0), features);
    weights.familiarity = Some(Familiarity {
        format: FloatFormat::F32,
        relative: false,
        means: Rows::Int4(rows(classes)),
        covariance: Covariance::Even { scale: 0.25, factor: rows(2) },
        threshold: 9.0,
        pass_share: 0.0,
    });
    artifact.to_bytes().unwrap()
}

/// Bytes in front of the data section.
fn data_start(file: &[u8]) -> usize {
    8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize
}

#[test]
fn every_single_corrupted_byte_of_the_data_is_noticed_and_no_other_harms() {
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    for mut file in samples() {
        assert!(reads(&file));
        let data_start = data_start(&file);
        for i in 0..file.len() {
            let original = file[i];
            for flip in [0x01, 0x02, 0x20, 0x80, 0xFF] {
                file[i] = original ^ flip;
                let loaded = reads(&file);
                assert!(!(loaded && i >= data_start), "byte {i} of the data was changed unnoticed");
            }
            file[i] = original;
        }
    }
}

#[test]
fn every_truncation_is_refused() {
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    for file in samples() {
        for length in 0..file.len() {
            assert!(!reads(&file[..length]), "{length} of {} bytes loaded", file.len());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn several_corrupted_bytes_never_harm(
        seed in 0u64..4,
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        in_header: bool,
    ) {
        let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut file = files(&minute_config(), seed).expert_set;
        let length = if in_header { data_start(&file) } else { file.len() };
        for (index, byte) in edits {
            file[index.index(length)] = byte;
        }
        reads(&file);
    }

    #[test]
    fn headers_of_noise_never_harm(noise in prop::collection::vec(any::<u8>(), 0..300), length in 0u64..400) {
        let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        prop_assert!(!reads(&[&length.to_le_bytes()[..], &noise].concat()));
    }
}

#[test]
fn a_header_of_nested_or_repeated_json_never_harms() {
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let metadata = |document: &str| {
        serde_json::json!({ "__metadata__": { "butterflyvit": document, "sha256": "0".repeat(64) } }).to_string()
    };
    let set = |training: &str| format!(r#"{{"kind":"backbone","format_version":1,"name":"x","training":{training}}}"#);
    let headers = [
        "[".repeat(500_000),
        "{\"a\":".repeat(100_000),
        metadata(&"[".repeat(400_000)),
        metadata(&set(&format!("[{}0]", "0,".repeat(60_000)))),
        metadata(&set(&format!("[{}[]]", "[],".repeat(40_000)))),
        metadata(&set(&format!("[{}0]", "0,".repeat(450_000)))),
        metadata(&set(&format!("[{}{{}}]", r#"{"":0},"#.repeat(30_000)))),
        format!(r#"{{"a":{{"dtype":"U8","shape":[{}1],"data_offsets":[0,1]}}}}"#, "1,".repeat(400_000)),
        format!(r#"{{"a":{{"dtype":"F64","shape":[{0},{0}],"data_offsets":[0,{0}]}}}}"#, u64::MAX),
    ];
    for header in headers {
        assert!(!reads(&[&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()));
    }
}
