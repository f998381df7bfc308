//! The memory that a decoding is said to need bounds what it takes. A binary of its own, because it counts allocations.

#[path = "common/counting.rs"]
mod counting;

use std::io::Cursor;

use counting::{Counting, Taken, measure};
use image::{DynamicImage, ImageFormat, RgbImage};
use model_core::image::{DecodeLimits, decode_picture, probe};
use model_core::random::SplitMix64;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn encoded(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Vec::new();
    image.write_to(&mut Cursor::new(&mut bytes), format).unwrap();
    bytes
}

#[test]
fn decoding_takes_no_more_memory_than_its_bound() {
    let mut random = SplitMix64::at(1, 0);
    let noise = RgbImage::from_fn(1600, 1200, |_, _| image::Rgb(random.bits().to_le_bytes()[..3].try_into().unwrap()));
    let rgb = DynamicImage::ImageRgb8(noise);
    let grey16 = DynamicImage::ImageLuma16(rgb.to_luma16());
    let rgba16 = DynamicImage::ImageRgba16(rgb.to_rgba16());
    let rgba = DynamicImage::ImageRgba8(rgb.to_rgba8());
    let flat = DynamicImage::new_rgb8(1600, 1200);
    let mut cases: Vec<(String, Vec<u8>)> = ["progressive.jpg", "progressive-large.jpg", "lossy.webp", "palette.png"]
        .map(|name| (name.to_owned(), fixture(name)))
        .into();
    let mut case = |name: &str, image: &DynamicImage, format| {
        cases.push((format!("{name} {format:?}"), encoded(image, format)));
    };
    for format in [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::Bmp, ImageFormat::WebP, ImageFormat::Gif] {
        case("noise", &rgb, format);
        case("flat", &flat, format);
    }
    case("alpha", &rgba, ImageFormat::Png);
    case("alpha", &rgba, ImageFormat::WebP);
    case("grey 16", &grey16, ImageFormat::Png);
    case("rgba 16", &rgba16, ImageFormat::Png);

    let mut limited = Vec::new();
    for (name, bytes) in cases {
        // At every scale that it can be decoded at.
        let mut limits = DecodeLimits::default();
        while let Ok(info) = probe(&bytes, &limits) {
            limited.push((format!("{name} at 1/{}", info.reduction), bytes.clone(), limits));
            limits.max_bytes = info.decode_bytes_upper_bound - 1;
        }
    }
    for (name, bytes, limits) in limited {
        let decoding = measure(|| decode_picture(&bytes, &limits, &|| false).unwrap()).peak;
        let Taken { result, peak: probing, .. } = measure(|| probe(&bytes, &limits).unwrap());
        let bound = result.decode_bytes_upper_bound;
        eprintln!("{name}: file {}, peak {decoding}, probing {probing}, bound {bound}", bytes.len());
        assert!(decoding as u64 <= bound, "{name}: {decoding} bytes, but the bound says {bound}");
        // Headers are read before any memory is granted: a few components and scales.
        assert!(probing <= 4096, "{name}: {probing} bytes to look at the header");
    }
}
