//! The bytes a model says it holds are those it holds, and those the footprint announces.

mod common;
#[path = "common/counting.rs"]
mod counting;

use std::io::Write;

use common::{calibrated_files, files};
use counting::{Counting, measure};
use model_core::artifact::{Header, read_expert_set};
use model_core::config::{AngleSeed, FloatFormat, Generator, SubstrateConfig, TernaryPacking, ViTConfig};
use model_core::engine::{Backbone, ExpertSet};
use model_core::footprint::{Footprint, loading_bytes};
use model_core::random::SplitMix64;
use model_core::weights::{Covariance, Familiarity, Int4Rows, Rows};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocators round up and structs carry a few words, a hundred bytes a layer; what goes beyond that and a fiftieth has
/// been forgotten or counted twice.
fn assert_close(what: &str, got: u64, expected: u64) {
    assert!(got.abs_diff(expected) < expected / 50 + 1024, "{what}: {got} against {expected} bytes");
}

fn header(file: &[u8]) -> Header {
    let mut on_disk = tempfile::NamedTempFile::new().unwrap();
    on_disk.write_all(file).unwrap();
    Header::read(on_disk.path()).unwrap()
}

/// Bytes that stay, and most bytes that a load takes beside them.
fn announced(file: &[u8]) -> (u64, u64) {
    let Header { contents, file_bytes, .. } = header(file);
    (Footprint::of_artifact(&contents, file_bytes).totals().1, loading_bytes(&contents, file_bytes))
}

/// The set with statistics of four bits, more than there are classes.
fn with_statistics(expert_set: &[u8]) -> Vec<u8> {
    let mut artifact = read_expert_set(expert_set).unwrap();
    let d_model = artifact.backbone.d_model;
    let rows = |count: usize| Int4Rows::encode(&SplitMix64::at(3, 0).normals(count * d_model, 1.0), d_model);
    artifact.weights.familiarity = Some(Familiarity {
        format: FloatFormat::F32,
        relative: false,
        means: Rows::Int4(rows(1000)),
        covariance: Covariance::Even { scale: 0.1, factor: rows(16) },
        threshold: 1.0,
        pass_share: 0.0,
    });
    artifact.to_bytes().unwrap()
}

#[test]
fn a_model_holds_what_it_says_and_the_footprint_announces() {
    let mut few_experts = ViTConfig::preset("paper").unwrap();
    few_experts.backbone.num_layers = 2;
    few_experts.experts.num_experts = 16;
    let mut packed = few_experts.clone();
    packed.backbone.substrates =
        SubstrateConfig { shared: true, packing: TernaryPacking::FiveTrits, scales: FloatFormat::F16 };
    (packed.experts.router_bits, packed.experts.router_scales) = (4, FloatFormat::F16);
    let mut seeded = packed.clone();
    seeded.experts.angle_seed = Some(AngleSeed { generator: Generator::SplitMix64, seed: 1, spread_bits: 4 });
    let mut statistics = files(&ViTConfig::preset("cifar").unwrap(), 5);
    statistics.expert_set = with_statistics(&statistics.expert_set);
    for (name, files) in [
        ("cifar", files(&ViTConfig::preset("cifar").unwrap(), 5)),
        ("paper's layers", files(&few_experts, 5)),
        ("packed", files(&packed, 5)),
        ("seeded", files(&seeded, 5)),
        ("calibrated", calibrated_files(5)),
        ("statistics", statistics),
    ] {
        let backbone = measure(|| Backbone::from_bytes(&files.backbone).unwrap());
        let set = measure(|| ExpertSet::from_bytes(&files.expert_set, &backbone.result).unwrap());
        for (what, [kept, peak], says, file) in [
            ("backbone", [backbone.kept, backbone.peak], backbone.result.resident_bytes(), &files.backbone),
            ("expert set", [set.kept, set.peak], set.result.resident_bytes(), &files.expert_set),
        ] {
            let (resident, loading) = announced(file);
            assert_close(&format!("{name}: {what} held"), kept as u64, says as u64);
            // Of layers as narrow as those of the calibrated stem, most is padding, which differs from CPU to CPU.
            if name != "calibrated" {
                assert_close(&format!("{name}: {what} announced"), resident, says as u64);
            }
            // The file lies in memory beside what was counted.
            let peak = (peak + file.len()) as u64;
            eprintln!("{name}: {what} of {} bytes: peak {peak}, bound {}", file.len(), resident + loading);
            assert!(peak <= resident + loading, "{name}: {what}: {peak} bytes, {resident} + {loading} announced");
        }
    }
}
