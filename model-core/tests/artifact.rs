//! Artifacts as files: what is written reads back, and nothing else does.

mod common;

use common::{Files, files, minute_config};
use model_core::artifact::{
    ArtifactError, Contents, Digest, Header, read_backbone, read_expert_set, write_backbone, write_expert_set,
};
use model_core::config::ViTConfig;
use serde_json::{Value, json};

/// A safetensors file taken apart, to be put together again with something changed and the digest corrected: what
/// somebody could write who wants to do harm.
struct Forgery {
    header: Value,
    data: Vec<u8>,
}

impl Forgery {
    fn of(file: &[u8]) -> Self {
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        Self { header: serde_json::from_slice(&file[8..8 + length]).unwrap(), data: file[8 + length..].to_vec() }
    }

    fn edit_document(mut self, edit: impl FnOnce(&mut Value)) -> Self {
        let text = &mut self.header["__metadata__"]["butterflyvit"];
        let mut document = serde_json::from_str(text.as_str().unwrap()).unwrap();
        edit(&mut document);
        *text = Value::String(document.to_string());
        self
    }

    fn edit_header(mut self, edit: impl FnOnce(&mut Value)) -> Self {
        edit(&mut self.header);
        self
    }

    /// Overwrites the start of a tensor.
    fn edit_tensor(mut self, tensor: &str, bytes: &[u8]) -> Self {
        let start = self.header[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
        self.data[start..start + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn file(mut self) -> Vec<u8> {
        let document = self.header["__metadata__"]["butterflyvit"].as_str().unwrap().to_owned();
        self.header["__metadata__"]["sha256"] = json!(Digest::of(&document, &self.data).to_string());
        let header = self.header.to_string();
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &self.data].concat()
    }
}

#[test]
fn presets_read_back_as_they_were_written() {
    for name in ["tiny", "cifar"] {
        let Files { backbone, expert_set } = files(&ViTConfig::preset(name).unwrap(), 1);
        let b = read_backbone(&backbone).unwrap();
        let s = read_expert_set(&expert_set).unwrap();
        s.check_backbone(&b.weights.config, b.digest).unwrap();
        assert_eq!(write_backbone(&b.name, &b.weights, &b.preprocess, &b.training).unwrap(), backbone);
        assert_eq!(s.backbone, b.weights.config.shape());
        let bound = (&b.weights.config, s.backbone_digest);
        assert_eq!(write_expert_set(&s.name, &s.weights, bound, &s.training).unwrap(), expert_set);
        assert_eq!(s.training["seed"], 1);
    }
}

#[test]
fn every_code_width_reads_back() {
    for (angle_bits, router_bits) in [(4, 8), (6, 16), (8, 8), (16, 16)] {
        let mut config = minute_config();
        (config.experts.angle_bits, config.experts.router_bits) = (angle_bits, router_bits);
        let set = read_expert_set(&files(&config, 3).expert_set).unwrap();
        assert_eq!(set.weights.layers[0].rotation_hidden.codes.len(), 3 * 5);
        assert!(set.weights.layers[0].rotation_hidden.codes.iter().any(|&code| code != 0));
        assert!(set.weights.layers[0].router.iter().any(|&code| code < 0));
    }
}

#[test]
fn the_header_of_a_file_is_enough_to_register_it() {
    let Files { backbone, expert_set } = files(&minute_config(), 1);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("1.safetensors");
    std::fs::write(&path, &expert_set).unwrap();
    let header = Header::read(&path).unwrap();
    assert_eq!(header.digest, read_expert_set(&expert_set).unwrap().digest);
    assert_eq!(header.file_bytes, expert_set.len() as u64);
    let Contents::ExpertSet(set) = header.contents else { panic!("an expert set") };
    assert_eq!(set.labels.len(), 2);
    assert_eq!(set.backbone_digest, read_backbone(&backbone).unwrap().digest);

    for cut in [0, 7, 8, 100, expert_set.len() - 1] {
        std::fs::write(&path, &expert_set[..cut]).unwrap();
        Header::read(&path).unwrap_err();
    }
}

#[test]
fn an_expert_set_fits_its_own_backbone_only() {
    let own = files(&minute_config(), 1);
    let other = read_backbone(&files(&minute_config(), 2).backbone).unwrap();
    let set = read_expert_set(&own.expert_set).unwrap();
    let error = set.check_backbone(&other.weights.config, other.digest).unwrap_err();
    assert!(matches!(error, ArtifactError::BackboneDigest { .. }), "{error}");
    let own = read_backbone(&own.backbone).unwrap();
    let mut config = own.weights.config;
    config.num_layers = 2;
    assert!(matches!(set.check_backbone(&config, own.digest), Err(ArtifactError::BackboneConfig)));
}

#[test]
fn the_two_kinds_are_not_interchangeable() {
    let Files { backbone, expert_set } = files(&minute_config(), 1);
    assert_eq!(read_backbone(&expert_set).unwrap_err().to_string(), "expected a backbone, found an expert set");
    assert_eq!(read_expert_set(&backbone).unwrap_err().to_string(), "expected an expert set, found a backbone");
}

#[test]
fn a_forged_backbone_is_refused_with_the_reason() {
    let original = files(&minute_config(), 1).backbone;
    let document = |edit: fn(&mut Value)| Forgery::of(&original).edit_document(edit).file();
    let header = |edit: fn(&mut Value)| Forgery::of(&original).edit_header(edit).file();
    let tensor = |name: &str, bytes: &[u8]| Forgery::of(&original).edit_tensor(name, bytes).file();
    let nan = f32::NAN.to_le_bytes();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("format version 3; this program reads versions 1 to 2", document(|d| d["format_version"] = json!(3))),
        ("unknown variant `frontbone`", document(|d| d["kind"] = json!("frontbone"))),
        ("unknown field `extra`", document(|d| d["extra"] = json!(1))),
        ("missing field `training`", document(|d| drop(d.as_object_mut().unwrap().remove("training")))),
        ("field `name`: it is empty", document(|d| d["name"] = json!(""))),
        ("field `name`: \"a\\0b\" contains a control character", document(|d| d["name"] = json!("a\0b"))),
        ("field `preprocess.std`: 0 is not in", document(|d| d["preprocess"]["std"][1] = json!(0.0))),
        ("field `preprocess.mean`: inf is not in", document(|d| d["preprocess"]["mean"][1] = json!(1e300))),
        ("config field `backbone.num_heads`: 4 heads", document(|d| d["config"]["num_heads"] = json!(4))),
        ("config field `backbone.d_model`", document(|d| d["config"]["d_model"] = json!(1u64 << 40))),
        ("`norm.beta`: expected shape [6], got [2, 3]", header(|h| h["norm.beta"]["shape"] = json!([2, 3]))),
        (
            "`blocks.0.attention.proj.bias`: expected shape [12], got [6]",
            document(|d| {
                d["config"]["d_model"] = json!(12);
                d["config"]["stem"][1]["channels"] = json!(12);
            }),
        ),
        ("tensor `norm.gamma`, element 0: NaN is not finite", tensor("norm.gamma", &nan)),
        ("tensor `blocks.0.moe.up.scale`, element 0: 0 is not positive", tensor("blocks.0.moe.up.scale", &[0; 4])),
        ("tensor `blocks.0.moe.up.codes`, element 0: the two-bit code 3", tensor("blocks.0.moe.up.codes", &[0x30])),
        ("tensor `blocks.0.moe.up.codes`, element 1: padding", tensor("blocks.0.moe.up.codes", &[0, 0x10])),
        ("expected dtype F32, got I32", header(|h| h["norm.beta"]["dtype"] = json!("I32"))),
        (
            "tensor `norm.beta` is missing",
            header(|h| {
                let tensor = h.as_object_mut().unwrap().remove("norm.beta").unwrap();
                h["norm.delta"] = tensor;
            }),
        ),
        (
            "tensor `empty` does not belong",
            header(|h| {
                h["empty"] = json!({ "dtype": "U8", "shape": [0], "data_offsets": [0, 0] });
            }),
        ),
        (
            "lies where",
            header(|h| {
                let (beta, gamma) = (h["norm.beta"].take(), h["norm.gamma"].take());
                (h["norm.beta"], h["norm.gamma"]) = (gamma, beta);
            }),
        ),
        ("`__metadata__` has an unknown key `extra`", header(|h| h["__metadata__"]["extra"] = json!(""))),
        ("values; at most", document(|d| d["training"] = Value::Array(vec![json!(0); 200_000]))),
    ];
    for (expected, file) in cases {
        let error = read_backbone(&file).expect_err(expected).to_string();
        assert!(error.contains(expected), "wanted {expected:?}, got {error:?}");
    }
}

#[test]
fn a_forged_expert_set_is_refused_with_the_reason() {
    let original = files(&minute_config(), 1).expert_set;
    let document = |edit: fn(&mut Value)| Forgery::of(&original).edit_document(edit).file();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("tensor `head.bias`: expected shape [3], got [2]", document(|d| d["labels"] = json!(["a", "b", "c"]))),
        ("config field `num_classes`: 0", document(|d| d["labels"] = json!([]))),
        ("field `labels`: \"a\" occurs twice", document(|d| d["labels"] = json!(["a", "a"]))),
        ("field `labels`: it is empty", document(|d| d["labels"] = json!(["a", ""]))),
        ("field `labels`: it has 256 bytes", document(|d| d["labels"] = json!(["a".repeat(256), "b"]))),
        ("64 lower-case hexadecimal digits", document(|d| d["backbone_digest"] = json!("00"))),
        ("config field `experts.top_k`: 4", document(|d| d["config"]["top_k"] = json!(4))),
        ("config field `experts.angle_bits`: 7", document(|d| d["config"]["angle_bits"] = json!(7))),
        ("`blocks.0.moe.rotation_hidden`: expected shape [3, 1, 5], got [3, 1, 4]", {
            document(|d| d["config"]["angle_bits"] = json!(8))
        }),
        ("`blocks.0.moe.rotation_hidden`, element 3: padding bits", {
            Forgery::of(&original).edit_tensor("blocks.0.moe.rotation_hidden", &[0, 0, 0, 0x40]).file()
        }),
        ("`blocks.0.moe.router_scale`, element 0: -1 is not positive", {
            Forgery::of(&original).edit_tensor("blocks.0.moe.router_scale", &(-1f32).to_le_bytes()).file()
        }),
    ];
    for (expected, file) in cases {
        let error = read_expert_set(&file).expect_err(expected).to_string();
        assert!(error.contains(expected), "wanted {expected:?}, got {error:?}");
    }
}

/// A file that `fixtures/artifacts/make.py` wrote.
fn fixture(name: &str) -> Vec<u8> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/artifacts");
    std::fs::read(folder.join(format!("{name}.safetensors"))).unwrap()
}

#[test]
fn a_forged_backbone_of_version_2_is_refused_with_the_reason() {
    let original = fixture("v2_backbone");
    let document = |edit: fn(&mut Value)| Forgery::of(&original).edit_document(edit).file();
    let tensor = |name: &str, bytes: &[u8]| Forgery::of(&original).edit_tensor(name, bytes).file();
    let layer = |edit: fn(&mut Value)| Forgery::of(&original).edit_document(|d| edit(&mut d["config"]["stem"])).file();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("unknown variant `six_trits`", document(|d| d["config"]["substrates"]["packing"] = json!("six_trits"))),
        ("`moe.down.codes`: expected shape [12, 4], got [12, 3]", {
            document(|d| d["config"]["substrates"]["packing"] = json!("two_bits"))
        }),
        ("`blocks.0.moe.down.codes` is missing", document(|d| d["config"]["substrates"]["shared"] = json!(false))),
        ("`blocks.0.moe.down.scale`: expected dtype F32, got F16", {
            document(|d| d["config"]["substrates"]["scales"] = json!("f32"))
        }),
        ("`moe.up.codes`, element 1: five ternary weights make at most 242", tensor("moe.up.codes", &[242, 243])),
        ("`moe.up.codes`, element 2: unused places must be zero", tensor("moe.up.codes", &[0, 0, 9])),
        ("`blocks.1.moe.down.scale`, element 1: 0 is not positive", tensor("blocks.1.moe.down.scale", &[0, 60, 0, 0])),
        ("`blocks.1.moe.down.scale`, element 0: inf is not", tensor("blocks.1.moe.down.scale", &[0, 0x7c])),
        ("`stem.1.conv.weight`, element 2: the code is out of range", tensor("stem.1.conv.weight", &[0, 0, 0x80])),
        ("`stem.1.conv.weight_scale`, element 0: 0 is not positive", tensor("stem.1.conv.weight_scale", &[0; 4])),
        ("`stem.3.conv.weight`, element 0: NaN is not finite", tensor("stem.3.conv.weight", &[0, 0x7e])),
        ("`stem.0.step`, element 0: -1 is not positive", tensor("stem.0.step", &(-1f32).to_le_bytes())),
        ("`stem.3.step` is missing", document(|d| d["encoding"]["stem"][3]["calibrated"] = json!(true))),
        ("`stem.0.step` does not belong", document(|d| d["encoding"]["stem"][0]["calibrated"] = json!(false))),
        ("field `encoding.stem`: 4 layers, but the stem has 5", {
            document(|d| drop(d["encoding"]["stem"].as_array_mut().unwrap().pop()))
        }),
        ("`blocks.0.attention.proj.weight_scale` is missing", {
            document(|d| d["encoding"]["attention"] = json!("int8"))
        }),
        ("`backbone.stem.residual`: layer 3 adds the input of layer 4, which comes later", {
            layer(|stem| stem[3]["residual"] = json!(4))
        }),
        ("`backbone.stem.residual`: layer 3 makes 4x4x6; the input of layer 0, 8x8x3, cannot be added", {
            layer(|stem| stem[3]["residual"] = json!(0))
        }),
        ("`backbone.stem.groups`: layer 3: 5 groups do not divide 12 and 6 channels", {
            layer(|stem| stem[3]["groups"] = json!(5))
        }),
        ("`backbone.stem.groups`: layer 0: 0 groups", layer(|stem| stem[0]["groups"] = json!(0))),
        ("`backbone.stem.padding`: layer 2: a padding of [2, 1, 2, 4] makes the output no square", {
            layer(|stem| stem[2]["padding"] = json!([2, 1, 2, 4]))
        }),
        ("`backbone.stem.padding`: layer 2: [2, 1, 2, 5] is not below", {
            layer(|stem| stem[2]["padding"] = json!([2, 1, 2, 5]))
        }),
        ("unknown variant `swish`", layer(|stem| stem[2]["activation"] = json!("swish"))),
        ("field `preprocess.reduction`: 0.5 is not in", document(|d| d["preprocess"]["reduction"] = json!(0.5))),
        ("`background.covariance` does not belong", document(|d| d["background"] = Value::Null)),
        ("field `background.source`: it contains a control", document(|d| d["background"]["source"] = json!("\t"))),
        ("field `card.data`: it has 5000 bytes", document(|d| d["card"]["data"] = json!("x".repeat(5000)))),
        ("unknown field `license`", document(|d| d["card"] = json!({ "license": "MIT" }))),
    ];
    for (expected, file) in cases {
        let error = read_backbone(&file).expect_err(expected).to_string();
        assert!(error.contains(expected), "wanted {expected:?}, got {error:?}");
    }
}

#[test]
fn a_forged_expert_set_of_version_2_is_refused_with_the_reason() {
    let [learned, seeded, borrower] = ["v2_set", "v2_seeded", "v2_borrower"].map(fixture);
    let edited = |original: &[u8], edit: fn(&mut Value)| Forgery::of(original).edit_document(edit).file();
    let tensor = |original: &[u8], name: &str, bytes: &[u8]| Forgery::of(original).edit_tensor(name, bytes).file();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("unknown variant `mt19937`, expected `splitmix64`", {
            edited(&seeded, |d| d["config"]["angle_seed"]["generator"] = json!("mt19937"))
        }),
        ("`experts.angle_seed.seed`: 9007199254740992 is not below 2^53", {
            edited(&seeded, |d| d["config"]["angle_seed"]["seed"] = json!(1u64 << 53))
        }),
        ("`experts.angle_seed.spread_bits`: 7 is not in 1..=angle_bits (6)", {
            edited(&seeded, |d| d["config"]["angle_seed"]["spread_bits"] = json!(7))
        }),
        ("`blocks.0.moe.rotation_hidden` is missing", edited(&seeded, |d| d["config"]["angle_seed"] = Value::Null)),
        ("`blocks.0.moe.router`, element 0: the code is out of range", {
            tensor(&seeded, "blocks.0.moe.router", &[0x08])
        }),
        ("`experts.router_bits`: 5 is not 4, 8 or 16", edited(&seeded, |d| d["config"]["router_bits"] = json!(5))),
        ("`blocks.0.moe.router_scale`: expected dtype F32, got F16", {
            edited(&seeded, |d| d["config"]["router_scales"] = json!("f32"))
        }),
        ("`head.weight`, element 0: the code is out of range", tensor(&learned, "head.weight", &[0x80])),
        ("`head.weight`: expected dtype F16, got I8", edited(&learned, |d| d["encoding"]["head"] = json!("f16"))),
        ("64 lower-case hexadecimal digits", edited(&borrower, |d| d["borrowed_experts"] = json!("none"))),
        ("`blocks.0.moe.router_scale` is missing", edited(&borrower, |d| d["borrowed_experts"] = Value::Null)),
        ("field `temperature`: 0 is not in", edited(&learned, |d| d["temperature"] = json!(0.0))),
        ("field `familiarity.means`: 0 is not in", edited(&learned, |d| d["familiarity"]["means"] = json!(0))),
        ("field `familiarity.covariance.rank`: 13 is not in", {
            edited(&borrower, |d| d["familiarity"]["covariance"]["rank"] = json!(13))
        }),
        ("field `familiarity.covariance.scale`: 0 is not in", {
            edited(&borrower, |d| d["familiarity"]["covariance"]["scale"] = json!(0.0))
        }),
        ("field `familiarity.threshold`: inf is not in", {
            edited(&borrower, |d| d["familiarity"]["threshold"] = json!(1e300))
        }),
        ("`familiarity.diagonal`, element 0: 0 is not positive", tensor(&seeded, "familiarity.diagonal", &[0, 0])),
        ("`familiarity.factor` does not belong", {
            edited(&borrower, |d| d["familiarity"]["covariance"]["rank"] = json!(0))
        }),
        ("field `view.crop`: the crop [0.5, 0.0, 0.6, 1.0] reaches outside", {
            edited(&learned, |d| d["view"]["crop"] = json!([0.5, 0.0, 0.6, 1.0]))
        }),
        ("field `view.crop`: the crop [0.0, 0.0, 0.0, 1.0] has no area", {
            edited(&learned, |d| d["view"]["crop"] = json!([0.0, 0.0, 0.0, 1.0]))
        }),
        ("unknown variant `squeeze`", edited(&learned, |d| d["view"]["fit"] = json!("squeeze"))),
        // Sizes whose product wraps in 32 bits: 65536 * 65537 / 2 values of 2 bytes each.
        ("`familiarity.covariance`: expected shape [2147516416], got [78]", {
            edited(&learned, |d| {
                d["backbone"]["d_model"] = json!(65536);
                d["borrowed_experts"] = json!("0".repeat(64));
            })
        }),
    ];
    for (expected, file) in cases {
        let error = read_expert_set(&file).expect_err(expected).to_string();
        assert!(error.contains(expected), "wanted {expected:?}, got {error:?}");
    }
}

#[test]
fn what_another_reader_could_take_differently_is_refused_in_the_header() {
    let original = files(&minute_config(), 1).backbone;
    let Forgery { header, data } = Forgery::of(&original);
    let text = header.to_string();
    let file = |header: &str| [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    read_backbone(&file(&text)).unwrap();
    // White space behind the object, and none.
    read_backbone(&file(&format!("{text} \n\t"))).unwrap();
    let twice = |key: &str, value: &Value| format!("{{{}:{value},{}", json!(key), &text[1..]);
    let metadata = header["__metadata__"].to_string();
    let cases = [
        ("the key `norm.beta` occurs twice", twice("norm.beta", &header["norm.beta"])),
        ("the key `__metadata__` occurs twice", twice("__metadata__", &header["__metadata__"])),
        ("the key `sha256` occurs twice in `__metadata__`", {
            text.replace(&metadata, &format!("{{\"sha256\":\"\",{}", &metadata[1..]))
        }),
        ("unknown field `note`", text.replacen("\"dtype\"", "\"note\":1,\"dtype\"", 1)),
        ("duplicate field `dtype`", text.replacen("\"dtype\"", "\"dtype\":\"U8\",\"dtype\"", 1)),
        ("trailing characters", format!("{text}x")),
    ];
    for (expected, header) in cases {
        let error = read_backbone(&file(&header)).expect_err(expected).to_string();
        assert!(error.contains(expected), "wanted {expected:?}, got {error:?}");
    }
}

#[test]
fn training_summaries_nest_and_count_as_far_as_the_format_says() {
    let original = files(&minute_config(), 1).backbone;
    let with = |training: &str| {
        let mut forgery = Forgery::of(&original);
        let text = &mut forgery.header["__metadata__"]["butterflyvit"];
        let document = text.as_str().unwrap();
        let at = document.rfind("\"training\":").unwrap() + "\"training\":".len();
        *text = Value::String(format!("{}{training}}}", &document[..at]));
        read_backbone(&forgery.file()).map(drop)
    };
    let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    // The document itself is one level.
    with(&nested(126)).unwrap();
    with(&nested(127)).unwrap_err();
    with("1.7e308").unwrap();
    with("1e309").unwrap_err();
}

#[test]
fn sizes_that_lie_are_refused_before_anything_is_read() {
    let original = files(&minute_config(), 1).backbone;
    let with_length = |length: u64| [&length.to_le_bytes()[..], &original[8..]].concat();
    let error = read_backbone(&with_length(u64::MAX)).unwrap_err();
    assert!(matches!(error, ArtifactError::HeaderTooLong { .. }), "{error}");
    let error = read_backbone(&with_length(original.len() as u64)).unwrap_err();
    assert!(matches!(error, ArtifactError::Truncated { .. }), "{error}");
    let longer = [&original[..], &[0]].concat();
    assert!(matches!(read_backbone(&longer), Err(ArtifactError::FileSize { .. })));
}

#[test]
fn weights_that_do_not_fit_their_configuration_are_not_written() {
    let Files { backbone, expert_set } = files(&minute_config(), 1);
    let b = read_backbone(&backbone).unwrap();
    let write = |weights| write_backbone("x", &weights, &b.preprocess, &Value::Null).unwrap_err().to_string();

    let mut weights = b.weights.clone();
    weights.blocks[0].qkv.weight = vec![0.0; 107].into();
    assert!(write(weights).contains("`blocks.0.attention.qkv.weight`: the configuration asks for 108 elements"));
    let mut weights = b.weights.clone();
    weights.blocks.clear();
    assert!(write(weights).contains("`blocks`: the configuration asks for 1 elements, the weights have 0"));
    let mut weights = b.weights.clone();
    weights.stem[1].norm = weights.stem[0].norm.clone();
    assert!(write(weights).contains("`stem.1.norm`"));
    let mut weights = b.weights.clone();
    weights.pos_embed[3] = f32::INFINITY;
    assert!(write(weights).contains("`pos_embed`, element 3: inf is not finite"));

    let mut set = read_expert_set(&expert_set).unwrap();
    set.weights.layers[0].rotation_in.codes[2] = 64;
    let error = write_expert_set("x", &set.weights, (&b.weights.config, b.digest), &Value::Null).unwrap_err();
    assert!(error.to_string().contains("`blocks.0.moe.rotation_in`, element 2: the code is out of range"), "{error}");
}
