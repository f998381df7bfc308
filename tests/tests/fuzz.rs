//! Mutations of valid inputs, at the four places where bytes of strangers are taken apart: artifacts, image files,
//! multipart bodies and the binary framing of the Open Inference Protocol.
//!
//! A few thousand inputs each by default; by hand for hours, starting somewhere new each time:
//!
//!     FUZZ_SECONDS=3600 FUZZ_SEED=$RANDOM cargo test --release -p system-tests --test fuzz -- --nocapture
//!
//! The corpus is `tests/images`, and files and bodies made here. An input that fails is written to `target/fuzz/`.

use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use model_core::artifact::{read_backbone, read_expert_set};
use model_core::config::ViTConfig;
use model_core::image::{DecodeLimits, Preprocess, decode, probe};
use system_tests::fixtures::{Random, backbone_artifact, expert_set_artifact};
use system_tests::server::{Answer, Server, image, image_names, root};

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// Feeds mutations of `corpus` to `target` until `count` have been tried, or for `FUZZ_SECONDS`.
fn fuzz(name: &str, corpus: &[Vec<u8>], count: usize, mut target: impl FnMut(&[u8])) {
    let seed = variable("FUZZ_SEED").unwrap_or(1);
    let end = variable("FUZZ_SECONDS").map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let mut random = Random::new(seed);
    let mut tried = 0;
    while end.map_or(tried < count, |end| Instant::now() < end) {
        let input = mutation(corpus, &mut random);
        if let Err(panic) = std::panic::catch_unwind(AssertUnwindSafe(|| target(&input))) {
            let path: PathBuf = root().join("target/fuzz").join(format!("{name}-{seed}-{tried}"));
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, &input).unwrap();
            eprintln!("{name}: FUZZ_SEED={seed}, input {tried}, written to {}", path.display());
            std::panic::resume_unwind(panic);
        }
        tried += 1;
    }
    println!("{name}: {tried} inputs from seed {seed}");
}

/// One to eight changes to one input: the kinds that parsers trip over.
fn mutation(corpus: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    const TELLING: [&[u8]; 9] = [
        b"\0",
        b"\xff",
        b"\xff\xff\xff\xff",
        b"\0\0\0\0",
        b"\x7f\xff\xff\xff",
        b"\r\n",
        b"--",
        b"{",
        b"18446744073709551615",
    ];
    let below = |random: &mut Random, bound: usize| random.bits() as usize % bound.max(1);
    let mut bytes = corpus[below(random, corpus.len())].clone();
    for _ in 0..=below(random, 8) {
        // Headers are where the decisions are, so half of all changes are made there.
        let reach = if random.bits().is_multiple_of(2) { bytes.len().min(256) } else { bytes.len() };
        let at = below(random, reach);
        match below(random, 6) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << below(random, 8),
            1 if !bytes.is_empty() => bytes[at] = random.bits() as u8,
            2 => bytes.truncate(at),
            3 => {
                let piece = TELLING[below(random, TELLING.len())];
                bytes.splice(at..at, piece.iter().copied());
            }
            4 => {
                let end = (at + below(random, 64)).min(bytes.len());
                bytes.drain(at..end);
            }
            _ => {
                let end = (at + below(random, 64)).min(bytes.len());
                let piece = bytes[at..end].to_vec();
                bytes.splice(at..at, piece);
            }
        }
    }
    bytes
}

#[test]
fn artifacts() {
    let config = ViTConfig::preset("tiny").unwrap();
    let (backbone, digest) = backbone_artifact(&config.backbone, 1);
    let set = expert_set_artifact(&config, digest, "set", 2);
    fuzz("artifacts", &[backbone, set], 4000, |bytes| {
        drop(read_backbone(bytes));
        drop(read_expert_set(bytes));
    });
}

#[test]
fn images() {
    let corpus: Vec<Vec<u8>> = image_names().iter().map(|name| image(name)).collect();
    let limits = DecodeLimits { max_pixels: 1 << 20, max_bytes: 16 << 20, ..DecodeLimits::default() };
    fuzz("images", &corpus, 20_000, |bytes| {
        // Whole, and at the smallest scale, which other decoders see to.
        for limits in [limits, DecodeLimits { detail: 1, ..limits }] {
            let Ok(info) = probe(bytes, &limits) else { return };
            assert!(info.decode_bytes_upper_bound <= limits.max_bytes);
            if let Ok(image) = decode(bytes, &limits) {
                assert_eq!(Preprocess::default().pixels(&image, 32).len(), 32 * 32 * 3);
            }
        }
    });
}

/// What a client may have got wrong; anything else is a fault of the server.
fn is_the_clients_fault_or_fine(answer: &Answer) {
    assert!([200, 400, 413, 415, 422].contains(&answer.status), "{}: {}", answer.status, answer.text);
}

#[test]
fn multipart_bodies() {
    let part = |head: &str, data: &[u8]| {
        [format!("--edge\r\nContent-Disposition: form-data; {head}\r\n\r\n").as_bytes(), data, b"\r\n"].concat()
    };
    let file = part("name=\"image\"; filename=\"a.png\"\r\nContent-Type: image/png", &image("test-00.png"));
    let more = part("name=\"other\"; filename*=UTF-8''b.jpg", &image("test-01.jpg"));
    let field = part("name=\"top_k\"", b"3");
    let end = b"--edge--\r\n".to_vec();
    let corpus = [[&file[..], &end].concat(), [&field[..], &file, &more, &end].concat()];
    let server = Server::start([] as [&str; 0]);
    fuzz("multipart bodies", &corpus, 1500, |bytes| {
        let request = server.post("/classify").header("content-type", "multipart/form-data; boundary=edge");
        is_the_clients_fault_or_fine(&Answer::of(request.body(bytes.to_vec())));
    });
    assert_eq!(server.classify(&image("test-00.png")).status, 200);
}

#[test]
fn binary_tensors() {
    let framed = |json: String, tensor: &[u8]| [&(json.len() as u32).to_le_bytes(), json.as_bytes(), tensor].concat();
    let picture = image("test-00.png");
    let string = [&(picture.len() as u32).to_le_bytes(), &picture[..]].concat();
    let input = |name: &str, shape: &str, datatype: &str, size: usize| {
        format!(
            r#"{{"inputs":[{{"name":"{name}","shape":{shape},"datatype":"{datatype}","parameters":{{"binary_data_size":{size}}}}}],"outputs":[{{"name":"scores","parameters":{{"classification":3,"binary_data":true}}}}]}}"#
        )
    };
    let corpus = [
        framed(input("image", "[1]", "BYTES", string.len()), &string),
        framed(input("pixels", "[1,8,8,3]", "UINT8", 192), &[7; 192]),
        framed(input("input", "[1,3,32,32]", "FP32", 12288), &[0; 12288]),
    ];
    let server = Server::start([] as [&str; 0]);
    fuzz("binary tensors", &corpus, 1500, |bytes| {
        // The first four bytes stand for the header that says how long the JSON is, so that it is mutated too.
        let (length, body) = bytes.split_at(bytes.len().min(4));
        let length = length.iter().rev().fold(0u64, |length, &byte| length << 8 | u64::from(byte));
        let request = server.post("/v2/models/cifar100/infer").header("inference-header-content-length", length);
        is_the_clients_fault_or_fine(&Answer::of(request.body(body.to_vec())));
    });
    assert_eq!(server.classify(&image("test-00.png")).status, 200);
}
