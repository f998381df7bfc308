//! The bytes a model says it holds are those it holds, and those the footprint announces.

mod common;
#[path = "common/counting.rs"]
mod counting;

use std::io::Write;

use common::files;
use counting::{Counting, measure};
use model_core::artifact::Header;
use model_core::config::{AngleSeed, FloatFormat, Generator, SubstrateConfig, TernaryPacking, ViTConfig};
use model_core::engine::{Backbone, ExpertSet};
use model_core::footprint::Footprint;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocators round up and structs carry a few words; anything beyond a fiftieth has been forgotten or counted twice.
const TOLERANCE: f64 = 0.02;

fn assert_close(what: &str, got: u64, expected: u64) {
    let ratio = got as f64 / expected as f64;
    assert!((ratio - 1.0).abs() < TOLERANCE, "{what}: {got} against {expected} bytes");
}

fn announced(file: &[u8]) -> u64 {
    let mut on_disk = tempfile::NamedTempFile::new().unwrap();
    on_disk.write_all(file).unwrap();
    let header = Header::read(on_disk.path()).unwrap();
    Footprint::of_artifact(&header.contents, header.file_bytes).totals().1
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
    for (name, config) in [
        ("cifar", ViTConfig::preset("cifar").unwrap()),
        ("paper's layers", few_experts),
        ("packed", packed),
        ("seeded", seeded),
    ] {
        let files = files(&config, 5);
        let backbone = measure(|| Backbone::from_bytes(&files.backbone).unwrap());
        let set = measure(|| ExpertSet::from_bytes(&files.expert_set, &backbone.result).unwrap());
        for (what, kept, says, file) in [
            ("backbone", backbone.kept, backbone.result.resident_bytes(), &files.backbone),
            ("expert set", set.kept, set.result.resident_bytes(), &files.expert_set),
        ] {
            assert_close(&format!("{name}: {what} held"), kept as u64, says as u64);
            assert_close(&format!("{name}: {what} announced"), announced(file), says as u64);
        }
    }
}
