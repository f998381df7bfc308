//! Where every byte goes: components of an artifact on disk and in memory, and what the feed-forward layers save
//! against dense experts, by the paper's accounting and by ours. `butterflyvit inspect` prints it.
//!
//! The paper (arXiv 2603.06746) counts one substrate at 1.58 bits a weight and 16-bit angles against dense fp32
//! experts of two matrices. Ours counts everything that the layers need at run time: both substrates as the engine
//! holds them, their scales, angle codes and routers, against dense fp32 experts with a fp32 router.

use std::fmt;

use serde::Serialize;

use crate::artifact::{Contents, CovarianceForm, Encoding, FamiliarityConfig, TensorSize};
use crate::config::{BackboneShape, ExpertConfig, FeedForwardKind, TernaryPacking, ViTConfig};
use crate::engine::storage;
use crate::kernels::gemm::float::panels_len;
use crate::kernels::{Int8Rows, TernaryStorage};

const F32_BYTES: u64 = 4;

/// Rows and columns that an integer matrix is padded to: see `kernels/gemm`.
const INTEGER_PANEL: u64 = 16;

/// Bytes of a tensor as the engine packs it: ternary codes and scales as they are stored, weights of attention, of the
/// stem behind its first layer and of an int8 head as int8 with a scale per row, angle and router codes at their own
/// width, everything else f32.
fn resident_bytes(tensor: &TensorSize) -> u64 {
    let (elements, rows) = (tensor.elements, tensor.rows);
    let cols = elements / rows.max(1);
    let padded_rows = rows.next_multiple_of(INTEGER_PANEL);
    let name = &tensor.name;
    let is_weight = name.ends_with(".weight");
    let is_int8 = name.contains(".attention.") || (name.starts_with("stem.") && !name.starts_with("stem.0."));
    match tensor.encoding {
        // A head of few classes is not padded.
        Encoding::Int8 if name == "head.weight" && rows <= Int8Rows::MOST as u64 => elements + rows * F32_BYTES,
        Encoding::Float(_) | Encoding::Int8 if is_weight && (is_int8 || tensor.encoding == Encoding::Int8) => {
            padded_rows * cols.next_multiple_of(INTEGER_PANEL) + padded_rows * F32_BYTES
        }
        Encoding::Float(_) if is_weight => panels_len(rows as usize, cols as usize) as u64 * F32_BYTES,
        // The scale of an int8 weight is counted with the weight.
        Encoding::Float(_) if name.ends_with(".weight_scale") => 0,
        Encoding::Float(format) if name.contains(".moe.") => {
            let padding = if name.ends_with(".scale") { INTEGER_PANEL } else { 1 };
            rows.next_multiple_of(padding) * format.bytes() as u64
        }
        Encoding::Float(_) | Encoding::Int8 => elements * F32_BYTES,
        Encoding::Ternary(packing) => {
            let five_trits = packing == TernaryPacking::FiveTrits;
            TernaryStorage { five_trits, half_scales: false }.codes_bytes(rows as usize, cols as usize) as u64
        }
        Encoding::Codes(bits) => elements * u64::from(bits) / 8,
        Encoding::Signed(4) => rows * cols.div_ceil(2),
        Encoding::Signed(bits) => elements * u64::from(bits) / 8,
    }
}

/// Most bytes of a value of the header while the header is parsed: texts are copied once or twice, every number
/// becomes a value of its own.
const PARSING_BYTES: u64 = 16;

/// Most bytes that reading and packing an artifact takes beside those that stay: the file, its tensors as they are decoded
/// (codes grow to one or two bytes each), and the largest of them once more.
pub fn loading_bytes(contents: &Contents, file_bytes: u64) -> u64 {
    let tensors = contents.tensor_sizes();
    let header_bytes = file_bytes.saturating_sub(tensors.iter().map(|tensor| tensor.disk_bytes).sum());
    let decoded = tensors.iter().map(|tensor| {
        tensor.elements
            * match tensor.encoding {
                Encoding::Float(_) => F32_BYTES,
                Encoding::Ternary(_) | Encoding::Int8 => 1,
                Encoding::Codes(_) | Encoding::Signed(_) => 2,
            }
    });
    let (sum, largest) = decoded.fold((0, 0), |(sum, largest): (u64, u64), bytes| (sum + bytes, largest.max(bytes)));
    file_bytes + sum + largest + header_bytes * PARSING_BYTES
}

/// Bytes of one kind of parameter in an artifact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Component {
    /// What the parameters are, in the words of the design.
    pub name: &'static str,
    /// Bytes in the file.
    pub disk_bytes: u64,
    /// Bytes the engine holds.
    pub resident_bytes: u64,
}

/// Components of an artifact, in the order of the forward pass. `file_bytes` is the size of the whole file; what the
/// tensors leave of it is the header.
pub fn components(contents: &Contents, file_bytes: u64) -> Vec<Component> {
    let tensors = contents.tensor_sizes();
    let data_bytes: u64 = tensors.iter().map(|tensor| tensor.disk_bytes).sum();
    let text_bytes = match contents {
        Contents::Backbone(_) => 0,
        Contents::ExpertSet(set) => set.labels.iter().map(|label| (size_of::<String>() + label.len()) as u64).sum(),
    };
    let header_bytes = file_bytes.saturating_sub(data_bytes);
    let mut components =
        vec![Component { name: "header and labels", disk_bytes: header_bytes, resident_bytes: text_bytes }];
    for tensor in &tensors {
        let name = component_of(&tensor.name);
        let (disk_bytes, resident_bytes) = (tensor.disk_bytes, resident_bytes(tensor));
        match components.iter_mut().find(|component| component.name == name) {
            Some(component) => {
                component.disk_bytes += disk_bytes;
                component.resident_bytes += resident_bytes;
            }
            None => components.push(Component { name, disk_bytes, resident_bytes }),
        }
    }
    if let Some(component) = components.iter_mut().find(|component| component.name == "statistics") {
        component.resident_bytes += tables_bytes(contents);
    }
    components
}

/// Of an even covariance: lengths of the means, their products with the factor, and a triangle of its rows.
fn tables_bytes(contents: &Contents) -> u64 {
    let Contents::ExpertSet(set) = contents else { return 0 };
    match set.familiarity {
        Some(FamiliarityConfig { means, covariance: CovarianceForm::Even { rank, .. }, .. }) => {
            let (means, rank) = (means as u64, rank as u64);
            F32_BYTES * (means * (rank + 1) + rank * (rank + 1) / 2)
        }
        _ => 0,
    }
}

/// The component a tensor of `FORMAT.md` counts towards.
fn component_of(tensor: &str) -> &'static str {
    let parts = [
        ("stem.", "stem"),
        ("pos_embed", "position embedding"),
        (".attention.", "attention"),
        (".up.codes", "substrates"),
        (".down.codes", "substrates"),
        (".up.scale", "substrate scales"),
        (".down.scale", "substrate scales"),
        (".router", "routers"),
        (".rotation_", "angle codes"),
        ("head.", "head"),
        ("familiarity.", "statistics"),
        ("background.", "statistics"),
        ("norm", "norms"),
    ];
    parts.iter().find(|(part, _)| tensor.contains(part)).map_or("other", |(_, name)| name)
}

/// Bytes of the feed-forward layers against those of the dense experts they replace.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Compression {
    /// Dense fp32 experts of two matrices `[d_ff, d_model]`, without biases.
    pub dense_bytes: f64,
    /// The same layers as substrates and rotations.
    pub butterfly_bytes: f64,
}

impl Compression {
    /// How many times smaller.
    pub fn ratio(&self) -> f64 {
        self.dense_bytes / self.butterfly_bytes
    }
}

/// Bits of a ternary weight as the paper counts them.
const PAPER_TERNARY_BITS: f64 = 1.58;

/// The paper's accounting for one layer: one substrate at 1.58 bits a weight and 16 bits an angle, whatever the
/// configuration's own code widths, against dense fp32 experts.
pub fn paper_compression(backbone: &BackboneShape, experts: &ExpertConfig) -> Compression {
    const ANGLE_BYTES: usize = 2;
    let matrix = backbone.d_model * backbone.d_ff;
    let angles = experts.num_experts * experts.angles_per_expert(backbone);
    Compression {
        dense_bytes: (experts.num_experts * 2 * matrix * F32_BYTES as usize) as f64,
        butterfly_bytes: matrix as f64 * PAPER_TERNARY_BITS / 8.0 + (angles * ANGLE_BYTES) as f64,
    }
}

/// Bytes that one feed-forward layer takes at run time, by what they are. What layers share is split evenly.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LayerBytes {
    pub substrates: f64,
    /// One number per row of each substrate.
    pub scales: f64,
    /// Angle codes of all experts; none where they are drawn from a seed.
    pub angles: f64,
    /// Router codes and their scales.
    pub router: f64,
}

impl LayerBytes {
    /// One layer as the engine holds it.
    pub fn resident(backbone: &BackboneShape, experts: &ExpertConfig) -> Self {
        let BackboneShape { d_model, d_ff, num_layers, substrates } = *backbone;
        let storage = storage(substrates);
        let codes = storage.codes_bytes(d_ff, d_model) + storage.codes_bytes(d_model, d_ff);
        let angles = if experts.angle_seed.is_some() { 0 } else { experts.angles_per_expert(backbone) };
        let angle_bits = experts.num_experts as f64 * angles as f64 * f64::from(experts.angle_bits);
        let router_row = match experts.router_bits {
            4 => d_model.div_ceil(2),
            bits => d_model * bits as usize / 8,
        };
        Self {
            substrates: codes as f64 / if substrates.shared { num_layers as f64 } else { 1.0 },
            scales: (storage.scales_bytes(d_model) + storage.scales_bytes(d_ff)) as f64,
            angles: angle_bits / 8.0,
            router: (experts.num_experts * (router_row + experts.router_scales.bytes())) as f64,
        }
    }

    pub fn total(&self) -> f64 {
        self.substrates + self.scales + self.angles + self.router
    }
}

/// Our accounting for one layer: everything it needs at run time, against dense fp32 experts with a fp32 router.
pub fn runtime_compression(backbone: &BackboneShape, experts: &ExpertConfig) -> Compression {
    let (d_model, d_ff, num_experts) = (backbone.d_model, backbone.d_ff, experts.num_experts);
    let dense = num_experts * (2 * d_model * d_ff + d_model) * F32_BYTES as usize;
    Compression { dense_bytes: dense as f64, butterfly_bytes: LayerBytes::resident(backbone, experts).total() }
}

/// Bytes of one feed-forward layer of any kind, by the paper's accounting and by ours. The router of fp32 experts is
/// fp32; scales and routers count in ours only; gains count as the fp32 that training leaves; a tied `down` saves its
/// codes; ternary matrices of an expert's own take the bits that a substrate takes.
pub fn layer_bytes(kind: FeedForwardKind, backbone: &BackboneShape, experts: &ExpertConfig) -> (f64, f64) {
    let (paper, runtime) = (paper_compression(backbone, experts), runtime_compression(backbone, experts));
    match kind {
        FeedForwardKind::Butterfly => (paper.butterfly_bytes, runtime.butterfly_bytes),
        FeedForwardKind::ButterflyGains => {
            let gains = (experts.num_experts * backbone.d_ff) as f64 * F32_BYTES as f64;
            (paper.butterfly_bytes + gains, runtime.butterfly_bytes + gains)
        }
        FeedForwardKind::ButterflyTied => {
            // The paper's accounting has a single substrate to begin with.
            let down = LayerBytes::resident(backbone, experts).substrates / 2.0;
            (paper.butterfly_bytes, runtime.butterfly_bytes - down)
        }
        FeedForwardKind::DenseExperts => (paper.dense_bytes, runtime.dense_bytes),
        FeedForwardKind::TernaryExperts | FeedForwardKind::Int4Experts | FeedForwardKind::Int8Experts => {
            let layer = LayerBytes::resident(backbone, experts);
            let weights = (experts.num_experts * 2 * backbone.d_model * backbone.d_ff) as f64;
            let (paper, runtime) = match kind {
                FeedForwardKind::TernaryExperts => {
                    (weights * PAPER_TERNARY_BITS / 8.0, experts.num_experts as f64 * layer.substrates)
                }
                FeedForwardKind::Int4Experts => (weights / 2.0, weights / 2.0),
                _ => (weights, weights),
            };
            let scales = (experts.num_experts * (backbone.d_model + backbone.d_ff)) as f64 * F32_BYTES as f64;
            (paper, runtime + scales + layer.router)
        }
        FeedForwardKind::LowRankExperts => {
            let factors = experts.num_experts * 2 * backbone.low_rank() * (backbone.d_model + backbone.d_ff);
            let (factors, routers) = (factors as f64 * F32_BYTES as f64, runtime.dense_bytes - paper.dense_bytes);
            (factors, factors + routers)
        }
        FeedForwardKind::Dense => {
            let one = paper.dense_bytes / experts.num_experts as f64;
            (one, one)
        }
    }
}

/// Everything `butterflyvit inspect` says of the memory of one artifact.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Footprint {
    /// Bytes by component.
    pub components: Vec<Component>,
    /// The feed-forward layers; for an expert set that has experts only.
    pub feed_forward: Option<FeedForward>,
}

/// What the feed-forward layers take, per layer, and what they save.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FeedForward {
    pub num_experts: usize,
    /// Bytes of one layer at run time.
    pub layer: LayerBytes,
    pub paper: Compression,
    pub runtime: Compression,
}

impl FeedForward {
    fn of(backbone: &BackboneShape, experts: &ExpertConfig) -> Self {
        Self {
            num_experts: experts.num_experts,
            layer: LayerBytes::resident(backbone, experts),
            paper: paper_compression(backbone, experts),
            runtime: runtime_compression(backbone, experts),
        }
    }
}

impl Footprint {
    /// The footprint of an artifact whose file has `file_bytes` bytes.
    pub fn of_artifact(contents: &Contents, file_bytes: u64) -> Self {
        let feed_forward = match contents {
            Contents::Backbone(_) => None,
            // A borrower's are those of the set that lends them; a backbone that is a stem alone has none.
            Contents::ExpertSet(set) if set.borrowed_experts.is_some() || set.backbone.num_layers == 0 => None,
            Contents::ExpertSet(set) => Some(FeedForward::of(&set.backbone, &set.config)),
        };
        Self { components: components(contents, file_bytes), feed_forward }
    }

    /// The savings of a configuration that need not exist as a file.
    pub fn of_config(config: &ViTConfig) -> Self {
        Self { components: Vec::new(), feed_forward: Some(FeedForward::of(&config.backbone.shape(), &config.experts)) }
    }

    /// Bytes on disk and resident, all components together.
    pub fn totals(&self) -> (u64, u64) {
        self.components.iter().fold((0, 0), |(disk, resident), component| {
            (disk + component.disk_bytes, resident + component.resident_bytes)
        })
    }
}

impl fmt::Display for Footprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.components.is_empty() {
            writeln!(f, "{:<24} {:>14} {:>14}", "component", "bytes on disk", "resident")?;
            for Component { name, disk_bytes, resident_bytes } in &self.components {
                writeln!(f, "{name:<24} {disk_bytes:>14} {resident_bytes:>14}")?;
            }
            let (disk, resident) = self.totals();
            writeln!(f, "{:<24} {disk:>14} {resident:>14}", "total")?;
        }
        let Some(FeedForward { num_experts, layer, paper, runtime }) = &self.feed_forward else { return Ok(()) };
        if !self.components.is_empty() {
            writeln!(f)?;
        }
        writeln!(f, "{:<24} {:>14}", format!("one layer, {num_experts} experts"), "resident")?;
        for (name, bytes) in [
            ("substrates (shared)", layer.substrates),
            ("substrate scales", layer.scales),
            ("angle codes", layer.angles),
            ("router", layer.router),
            ("total", layer.total()),
        ] {
            writeln!(f, "{name:<24} {bytes:>14.0}")?;
        }
        writeln!(f)?;
        writeln!(f, "{:<24} {:>14} {:>14} {:>9}", "against dense experts", "dense fp32", "butterfly", "smaller")?;
        for (name, c) in [("the paper's accounting", paper), ("all bytes at run time", runtime)] {
            writeln!(f, "{name:<24} {:>14.0} {:>14.0} {:>8.1}x", c.dense_bytes, c.butterfly_bytes, c.ratio())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    use crate::artifact::{BackboneEncoding, BackboneHeader, Digest, ExpertSetEncoding, ExpertSetHeader, StemEncoding};
    use crate::config::{AngleSeed, FloatFormat, Generator};
    use crate::image::{Preprocess, View};
    use crate::weights::Precision;

    fn paper() -> ViTConfig {
        ViTConfig::preset("paper").unwrap()
    }

    fn expert_set(config: &ViTConfig) -> Contents {
        let header = ExpertSetHeader {
            config: config.experts.clone(),
            encoding: ExpertSetEncoding::default(),
            backbone: config.backbone.shape(),
            backbone_config: None,
            backbone_digest: Digest::of("", &[]),
            borrowed_experts: None,
            labels: (0..config.num_classes).map(|i| format!("{i:03}")).collect(),
            projection: None,
            temperature: 1.0,
            familiarity: None,
            view: View::default(),
            report: Value::Null,
            card: None,
        };
        Contents::ExpertSet(header.into())
    }

    fn backbone(config: &ViTConfig) -> Contents {
        let config = config.backbone.clone();
        let stem = vec![StemEncoding::default(); config.stem.len()];
        let header = BackboneHeader {
            config,
            encoding: BackboneEncoding { stem, attention: Precision::F32 },
            preprocess: Preprocess::default(),
            background: None,
            card: None,
        };
        Contents::Backbone(header.into())
    }

    #[test]
    fn the_papers_configuration_is_354_times_smaller() {
        let config = paper();
        let compression = paper_compression(&config.backbone.shape(), &config.experts);
        // 64 experts x 2 matrices x 256 x 1024 weights x 4 bytes.
        assert_eq!(compression.dense_bytes, 134_217_728.0);
        // 256 x 1024 x 1.58 / 8 = 51,773.44, and 64 x 4 x (128 + 512) angles x 2 bytes = 327,680.
        assert!((compression.butterfly_bytes - 379_453.44).abs() < 1e-6);
        assert!((compression.ratio() - 353.7).abs() < 0.05, "{}", compression.ratio());
    }

    #[test]
    fn run_time_bytes_of_the_papers_configuration_count_everything() {
        let config = paper();
        let layer = LayerBytes::resident(&config.backbone.shape(), &config.experts);
        let expected = LayerBytes {
            substrates: 131_072.0, // 2 x 262,144 weights x 2 bits
            scales: 5_120.0,       // (256 + 1024) x 4
            angles: 163_840.0,     // 64 x 4 x (128 + 512)
            router: 16_640.0,      // 64 x (256 + 4)
        };
        assert_eq!(layer, expected);
        assert_eq!(layer.total(), 316_672.0);
        // Dense: 64 x (524,288 + 256) x 4 bytes.
        let runtime = runtime_compression(&config.backbone.shape(), &config.experts);
        assert_eq!(runtime.dense_bytes, 134_283_264.0);
        assert!((runtime.ratio() - 424.0).abs() < 0.05, "{}", runtime.ratio());
    }

    #[test]
    fn encodings_of_version_2_make_the_default_shape_a_thousand_times_smaller() {
        let config = ViTConfig::preset("cifar").unwrap();
        let ratio = |edit: fn(&mut ViTConfig)| {
            let mut config = config.clone();
            edit(&mut config);
            runtime_compression(&config.backbone.shape(), &config.experts).ratio()
        };
        let packed = |c: &mut ViTConfig| {
            c.backbone.substrates.packing = TernaryPacking::FiveTrits;
            c.backbone.substrates.scales = FloatFormat::F16;
            c.experts.router_scales = FloatFormat::F16;
        };
        let seed = AngleSeed { generator: Generator::SplitMix64, seed: 1, spread_bits: 4 };
        // Dense: 64 x (2 x 65,536 + 128) x 4 bytes = 33,587,200. Substrates 2 x 16,384, scales 640 x 4, angles
        // 64 x (3 x 64 + 2 x 256) / 2, router 64 x (128 + 4): 66,304.
        assert!((ratio(|_| {}) - 33_587_200.0 / 66_304.0).abs() < 1e-9);
        // Five trits: 2 x 205 groups of 64 bytes; scales 640 x 2; router 64 x (128 + 2).
        assert!((ratio(packed) - 33_587_200.0 / (26_240.0 + 1_280.0 + 22_528.0 + 8_320.0)).abs() < 1e-9);
        let mut seeded = config.clone();
        packed(&mut seeded);
        seeded.experts.angle_seed = Some(seed);
        seeded.experts.router_bits = 4;
        let seeded = runtime_compression(&seeded.backbone.shape(), &seeded.experts).ratio();
        // Router 64 x (64 + 2).
        assert!((seeded - 33_587_200.0 / (26_240.0 + 1_280.0 + 4_224.0)).abs() < 1e-9 && seeded > 1000.0, "{seeded}");
    }

    #[test]
    fn dense_kinds_count_fp32_matrices() {
        let config = paper();
        let bytes = |kind| layer_bytes(kind, &config.backbone.shape(), &config.experts);
        // 2 x 256 x 1024 weights x 4 bytes, times 64, plus a router of 64 x 256 x 4 bytes.
        assert_eq!(bytes(FeedForwardKind::Dense), (2_097_152.0, 2_097_152.0));
        assert_eq!(bytes(FeedForwardKind::DenseExperts), (134_217_728.0, 134_283_264.0));
        assert_eq!(bytes(FeedForwardKind::Butterfly).1, 316_672.0);
        assert_eq!(bytes(FeedForwardKind::ButterflyTied).1, 316_672.0 - 65_536.0);
        assert_eq!(bytes(FeedForwardKind::ButterflyGains).1, 316_672.0 + 262_144.0);
    }

    #[test]
    fn rivals_count_their_own_matrices_scales_and_routers() {
        let config = paper();
        let bytes = |kind| layer_bytes(kind, &config.backbone.shape(), &config.experts);
        // 64 x 2 x 256 x 1024 weights; scales of 64 x (256 + 1024) rows; a router of 64 rows of 256 bytes and a scale.
        let (weights, rest) = (33_554_432.0, 327_680.0 + 64.0 * 260.0);
        assert_eq!(bytes(FeedForwardKind::TernaryExperts), (weights * 1.58 / 8.0, weights / 4.0 + rest));
        assert_eq!(bytes(FeedForwardKind::Int4Experts), (weights / 2.0, weights / 2.0 + rest));
        assert_eq!(bytes(FeedForwardKind::Int8Experts), (weights, weights + rest));
        // Rank 32: 64 x 2 x 32 x (256 + 1024) fp32, and a router of 64 x 256.
        assert_eq!(bytes(FeedForwardKind::LowRankExperts), (20_971_520.0, 20_971_520.0 + 65_536.0));
    }

    #[test]
    fn codes_count_at_their_own_width() {
        let mut config = paper();
        // 64 experts x 4 stages x (128 + 512) pairs = 163,840 codes.
        for (bits, bytes) in [(16, 327_680.0), (8, 163_840.0), (6, 122_880.0), (4, 81_920.0)] {
            config.experts.angle_bits = bits;
            assert_eq!(LayerBytes::resident(&config.backbone.shape(), &config.experts).angles, bytes);
        }
    }

    #[test]
    fn components_add_up_to_the_file() {
        let config = paper();
        let file_bytes = 10_000_000;
        for contents in [backbone(&config), expert_set(&config)] {
            let footprint = Footprint::of_artifact(&contents, file_bytes);
            assert_eq!(footprint.totals().0, file_bytes);
            assert!(footprint.components.iter().all(|component| component.name != "other"));
        }
    }

    #[test]
    fn components_of_the_papers_expert_set_by_hand() {
        let footprint = Footprint::of_artifact(&expert_set(&paper()), 3_000_000);
        let disk = |name| footprint.components.iter().find(|component| component.name == name).unwrap().disk_bytes;
        assert_eq!(disk("angle codes"), 7 * 163_840);
        assert_eq!(disk("routers"), 7 * 16_640);
        assert_eq!(disk("head"), (100 * 256 + 100) * 4);
    }

    #[test]
    fn the_table_shows_both_accountings() {
        let text = Footprint::of_config(&paper()).to_string();
        assert!(text.contains("the paper's accounting        134217728         379453    353.7x"), "{text}");
        assert!(text.contains("all bytes at run time"), "{text}");
    }
}
