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
        let bound = (&s.backbone_config, s.backbone_digest);
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
    let Contents::ExpertSet { labels, backbone_digest, .. } = header.contents else { panic!("an expert set") };
    assert_eq!(labels.len(), 2);
    assert_eq!(backbone_digest, read_backbone(&backbone).unwrap().digest);

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
    config.num_heads = 1;
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
        ("format version 2; this program reads version 1", document(|d| d["format_version"] = json!(2))),
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
    weights.blocks[0].qkv.weight.pop();
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
