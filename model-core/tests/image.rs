//! Image bytes to pixels: every accepted kind, every refusal, and preprocessing to the last bit.

use std::io::Cursor;

use image::{DynamicImage, ImageFormat, Rgb, RgbImage};
use model_core::image::{Crop, DecodeLimits, Fit, ImageError, Picture, Preprocess, decode, decode_picture, probe};
use proptest::prelude::*;

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn decoded(bytes: &[u8]) -> RgbImage {
    decode(bytes, &DecodeLimits::default()).unwrap()
}

fn encoded(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Vec::new();
    image.write_to(&mut Cursor::new(&mut bytes), format).unwrap();
    bytes
}

fn photo() -> RgbImage {
    decoded(&fixture("photo.png"))
}

#[test]
fn resizing_equals_pillows_to_the_last_bit() {
    let photo = photo();
    for side in [1, 8, 32, 61, 100] {
        let expected = decoded(&fixture(&format!("photo_{side}.png")));
        assert_eq!(Preprocess::default().fit(&photo, side), expected.as_raw()[..], "side {side}");
    }
}

#[test]
fn parts_are_fitted_as_pillow_does_it() {
    let picture = Picture::from(photo());
    for (name, crop, fit) in [
        ("photo_pad_32.png", "0,0,1,1", Fit::Pad),
        ("photo_stretch_32.png", "0,0,1,1", Fit::Stretch),
        ("photo_part_crop_32.png", "20,5,60,41", Fit::Crop),
        ("photo_part_stretch_80.png", "20,5,60,41", Fit::Stretch),
    ] {
        let expected = decoded(&fixture(name));
        let crop = crop.parse().unwrap();
        let seen = Preprocess::default().see(&picture, (crop, fit), expected.width() as usize).unwrap().samples;
        assert!(seen == expected.as_raw()[..], "{name}");
    }
}

/// A part counts with its own size, so that a small part of a large file keeps its detail.
#[test]
fn files_are_reduced_by_the_part_that_is_looked_at() {
    let bytes = encoded(&DynamicImage::new_rgb8(2048, 1600), ImageFormat::Jpeg);
    for (crop, reduction, size) in
        [("0,0,1,1", 4, (512, 400)), ("0,0,0.25,0.25", 1, (2048, 1600)), ("0,0,1024,512", 2, (1024, 800))]
    {
        let crop: Crop = crop.parse().unwrap();
        let limits = DecodeLimits { crop, ..DecodeLimits::default() }.for_input(&Preprocess::default(), 32);
        assert_eq!(probe(&bytes, &limits).unwrap().reduction, reduction, "{crop:?}");
        assert_eq!(decode(&bytes, &limits).unwrap().dimensions(), size, "{crop:?}");
        let picture = decode_picture(&bytes, &limits, &|| false).unwrap();
        let seen = Preprocess::default().see(&picture, (crop, Fit::Stretch), 32).unwrap().seen;
        assert_eq!(seen.crop, crop.shares((2048, 1600)).unwrap());
    }
    let outside = DecodeLimits { crop: Crop::Pixels([2000, 0, 49, 10]), ..DecodeLimits::default() };
    assert!(matches!(probe(&bytes, &outside), Err(ImageError::Crop { width: 2048, height: 1600, .. })));
}

/// A line of pixels would make a square of terabytes.
#[test]
fn a_picture_of_any_shape_takes_little_memory() {
    let line = Picture::from(RgbImage::new(70_000, 1));
    for fit in [Fit::Pad, Fit::Stretch] {
        let error = Preprocess::default().see(&line, (Crop::default(), fit), 32).unwrap_err();
        assert!(matches!(error, ImageError::TooLong { .. }), "{error}");
        let part = Crop::Pixels([0, 0, 60_000, 1]);
        assert_eq!(Preprocess::default().see(&line, (part, fit), 32).unwrap().samples.len(), 32 * 32 * 3);
    }
    assert!(Preprocess::default().see(&line, (Crop::default(), Fit::Crop), 32).is_ok());
}

#[test]
fn an_image_that_fits_passes_through_untouched() {
    let image = RgbImage::from_fn(32, 32, |x, y| Rgb([x as u8, y as u8, (x * y) as u8]));
    let preprocess = Preprocess { mean: [0.5071, 0.4865, 0.4409], std: [0.2673, 0.2564, 0.2762], ..Default::default() };
    assert_eq!(preprocess.fit(&image, 32), image.as_raw()[..]);
    let pixels = preprocess.pixels(&image, 32);
    assert_eq!(pixels.len(), 32 * 32 * 3);
    // Row 2, column 31: samples 31, 2, 62.
    assert_eq!(pixels[(2 * 32 + 31) * 3 + 2], (62.0 / 255.0 - 0.4409) / 0.2762);
}

#[test]
fn lossless_formats_decode_to_what_was_encoded() {
    let photo = DynamicImage::ImageRgb8(photo());
    for format in [ImageFormat::Png, ImageFormat::WebP, ImageFormat::Bmp] {
        assert_eq!(decoded(&encoded(&photo, format)), *photo.as_rgb8().unwrap(), "{format:?}");
    }
    assert_eq!(decoded(&fixture("palette.png")), decoded(&fixture("palette_expected.png")));
}

#[test]
fn lossy_formats_decode_to_something_close() {
    let photo = DynamicImage::ImageRgb8(photo());
    for format in [ImageFormat::Jpeg, ImageFormat::Gif] {
        let image = decoded(&encoded(&photo, format));
        let samples = image.as_raw().iter().zip(photo.as_bytes());
        let error: u64 = samples.map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
        assert!(error / (photo.as_bytes().len() as u64) < 16, "{format:?}: {error}");
    }
    for name in ["progressive.jpg", "lossy.webp"] {
        assert_eq!(decoded(&fixture(name)).dimensions(), (320, 256));
    }
}

#[test]
fn every_colour_type_becomes_rgb() {
    let photo = DynamicImage::ImageRgb8(photo());
    let grey = DynamicImage::ImageLuma8(photo.to_luma8()).to_rgb8();
    let cases: [(DynamicImage, &RgbImage); 7] = [
        (DynamicImage::ImageLuma8(photo.to_luma8()), &grey),
        (DynamicImage::ImageLumaA8(DynamicImage::ImageLuma8(photo.to_luma8()).to_luma_alpha8()), &grey),
        (DynamicImage::ImageLuma16(DynamicImage::ImageLuma8(photo.to_luma8()).to_luma16()), &grey),
        (DynamicImage::ImageLumaA16(DynamicImage::ImageLuma8(photo.to_luma8()).to_luma_alpha16()), &grey),
        (DynamicImage::ImageRgba8(photo.to_rgba8()), photo.as_rgb8().unwrap()),
        (DynamicImage::ImageRgb16(photo.to_rgb16()), photo.as_rgb8().unwrap()),
        (DynamicImage::ImageRgba16(photo.to_rgba16()), photo.as_rgb8().unwrap()),
    ];
    for (image, expected) in cases {
        assert_eq!(decoded(&encoded(&image, ImageFormat::Png)), *expected, "{:?}", image.color());
    }
}

#[test]
fn transparency_is_flattened_on_black() {
    let mut image = DynamicImage::ImageRgb8(photo()).to_rgba8();
    for (x, _, pixel) in image.enumerate_pixels_mut() {
        pixel.0[3] = [0, 128, 255][x as usize % 3];
    }
    let flat = decoded(&encoded(&DynamicImage::ImageRgba8(image), ImageFormat::Png));
    for (x, y, pixel) in photo().enumerate_pixels() {
        let expected = match x % 3 {
            0 => [0; 3],
            1 => pixel.0.map(|sample| ((u32::from(sample) * 128 * 2 + 255) / 510) as u8),
            _ => pixel.0,
        };
        assert_eq!(flat.get_pixel(x, y).0, expected);
    }
}

/// A JPEG with an EXIF block that holds nothing but the orientation.
fn with_orientation(jpeg: &[u8], orientation: u8) -> Vec<u8> {
    let mut exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0".to_vec();
    exif.extend([orientation, 0, 0, 0, 0, 0, 0, 0]);
    let length = (exif.len() + 2) as u16;
    [&jpeg[..2], &[0xFF, 0xE1], &length.to_be_bytes(), &exif, &jpeg[2..]].concat()
}

#[test]
fn exif_orientation_is_applied() {
    let jpeg = encoded(&DynamicImage::ImageRgb8(photo()), ImageFormat::Jpeg);
    let upright = DynamicImage::ImageRgb8(decoded(&jpeg));
    let cases: [(u8, DynamicImage); 8] = [
        (1, upright.clone()),
        (2, upright.fliph()),
        (3, upright.rotate180()),
        (4, upright.flipv()),
        (5, upright.rotate90().fliph()),
        (6, upright.rotate90()),
        (7, upright.rotate270().fliph()),
        (8, upright.rotate270()),
    ];
    for (orientation, expected) in cases {
        assert_eq!(decoded(&with_orientation(&jpeg, orientation)), *expected.as_rgb8().unwrap(), "{orientation}");
    }
    assert_eq!(decoded(&with_orientation(&jpeg, 77)), *upright.as_rgb8().unwrap(), "nonsense is ignored");
}

/// A PNG that consists of its header: enough to be asked for its size.
fn png_header(width: u32, height: u32) -> Vec<u8> {
    let mut ihdr = b"IHDR".to_vec();
    ihdr.extend([width.to_be_bytes(), height.to_be_bytes()].concat());
    ihdr.extend([8, 2, 0, 0, 0]);
    let crc = ihdr.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0xEDB8_8320 } else { 0 })
    });
    let idat = [0, 0, 0, 0, b'I', b'D', b'A', b'T', 0x35, 0xAF, 0x06, 0x1E];
    [b"\x89PNG\r\n\x1a\n\0\0\0\x0D", &ihdr[..], &(!crc).to_be_bytes(), &idat].concat()
}

#[test]
fn a_bomb_is_refused_by_its_header() {
    let limits = DecodeLimits::default();
    let error = decode(&png_header(30_000, 30_000), &limits).unwrap_err();
    assert!(matches!(error, ImageError::TooManyPixels { width: 30_000, height: 30_000, .. }), "{error}");
    assert_eq!(error.to_string(), "the image has 30000x30000 pixels; at most 16777216 are accepted");
    assert!(matches!(probe(&png_header(4097, 4096), &limits), Err(ImageError::TooManyPixels { .. })));
    assert_eq!(probe(&png_header(4096, 4096), &limits).unwrap().width, 4096);
    let beyond = decode(&png_header(u32::MAX, u32::MAX), &limits).unwrap_err();
    assert!(matches!(beyond, ImageError::TooManyPixels { .. }), "{beyond}");
    let narrow = DecodeLimits { max_pixels: 97 * 61 - 1, ..DecodeLimits::default() };
    assert!(matches!(decode(&fixture("photo.png"), &narrow), Err(ImageError::TooManyPixels { .. })));
}

/// What [`probe`] says when one byte less is allowed than it says is needed now, again and again.
fn reductions(bytes: &[u8]) -> Vec<(u32, DecodeLimits)> {
    let (mut limits, mut found) = (DecodeLimits::default(), Vec::new());
    while let Ok(info) = probe(bytes, &limits) {
        found.push((info.reduction, limits));
        limits.max_bytes = info.decode_bytes_upper_bound - 1;
    }
    let refused = decode(bytes, &limits).unwrap_err();
    assert!(matches!(refused, ImageError::TooMuchMemory { .. }), "{refused}");
    found
}

/// The mean of each `n` by `n` square, smaller at the right and lower edge, to the nearest.
fn means(image: &RgbImage, n: u32) -> RgbImage {
    RgbImage::from_fn(image.width().div_ceil(n), image.height().div_ceil(n), |x, y| {
        let columns = (x * n)..(x * n + n).min(image.width());
        let rows = (y * n)..(y * n + n).min(image.height());
        let pixels = || rows.clone().flat_map(|y| columns.clone().map(move |x| image.get_pixel(x, y)));
        let count = pixels().count() as u32;
        Rgb([0, 1, 2].map(|c| ((pixels().map(|pixel| u32::from(pixel[c])).sum::<u32>() + count / 2) / count) as u8))
    })
}

#[test]
fn short_of_memory_a_png_is_reduced_to_means() {
    let photo = DynamicImage::ImageRgb8(photo());
    let large = photo.resize_exact(1203, 901, image::imageops::FilterType::Triangle);
    let kinds = [
        DynamicImage::ImageRgb8(large.to_rgb8()),
        DynamicImage::ImageLuma8(large.to_luma8()),
        DynamicImage::ImageRgb16(large.to_rgb16()),
        DynamicImage::ImageLumaA16(large.to_luma_alpha16()),
        DynamicImage::ImageRgba8({
            let mut rgba = large.to_rgba8();
            rgba.enumerate_pixels_mut().for_each(|(x, y, pixel)| pixel[3] = (x + y) as u8);
            rgba
        }),
    ];
    for kind in kinds {
        let bytes = encoded(&kind, ImageFormat::Png);
        let whole = decoded(&bytes);
        let found = reductions(&bytes);
        assert_eq!(found.iter().map(|(n, _)| *n).collect::<Vec<_>>(), [1, 2, 4, 8], "{:?}", kind.color());
        for (n, limits) in found {
            assert!(decode(&bytes, &limits).unwrap() == means(&whole, n), "{:?} at 1/{n}", kind.color());
        }
    }
}

#[test]
fn short_of_memory_a_jpeg_is_reduced_to_about_the_means() {
    let photo = DynamicImage::ImageRgb8(photo());
    let large = photo.resize_exact(1203, 901, image::imageops::FilterType::Triangle);
    let grey = DynamicImage::ImageLuma8(large.to_luma8());
    for (name, bytes) in [
        ("colour", encoded(&large, ImageFormat::Jpeg)),
        ("grey", encoded(&grey, ImageFormat::Jpeg)),
        ("progressive", fixture("progressive-large.jpg")),
    ] {
        let whole = decoded(&bytes);
        let found = reductions(&bytes);
        assert_eq!(found.iter().map(|(n, _)| *n).collect::<Vec<_>>(), [1, 2, 4, 8], "{name}");
        for (n, limits) in found {
            let (reduced, means) = (decode(&bytes, &limits).unwrap(), means(&whole, n));
            assert_eq!(reduced.dimensions(), means.dimensions(), "{name} at 1/{n}");
            // In brightness: colour has half the resolution in many files, and is reduced as much again. Rounded sums of
            // the whole and of the reduced image are half a step off each.
            let brightness =
                |Rgb([r, g, b]): &Rgb<u8>| 0.299 * f64::from(*r) + 0.587 * f64::from(*g) + 0.114 * f64::from(*b);
            // Blocks at the right and lower edge are filled up with what is not there.
            let (columns, rows) = (whole.width() / n, whole.height() / n);
            let apart = |x, y| (brightness(reduced.get_pixel(x, y)) - brightness(means.get_pixel(x, y))).abs();
            let sum: f64 = (0..rows).map(|y| (0..columns).map(|x| apart(x, y)).sum::<f64>()).sum();
            let mean = sum / f64::from(columns * rows);
            // At a half and a quarter the low frequencies are taken, which is somewhat sharper than a mean.
            let tolerance = if n == 8 { 1.0 } else { 3.0 };
            assert!(mean <= tolerance, "{name} at 1/{n}: {mean:.2} apart in the mean");
        }
    }
}

/// The distance from what the model would see of the whole image, at most.
fn distance_with_detail_for(side: usize, bytes: &[u8]) -> (u32, u8) {
    let limits = DecodeLimits::default().for_input(&Preprocess::default(), side);
    let seen = |image: &RgbImage| Preprocess::default().fit(image, side);
    let (whole, reduced) = (seen(&decoded(bytes)), seen(&decode(bytes, &limits).unwrap()));
    let worst = whole.iter().zip(&reduced).map(|(&a, &b)| a.abs_diff(b)).max().unwrap();
    (probe(bytes, &limits).unwrap().reduction, worst)
}

#[test]
fn a_scale_is_chosen_that_leaves_eight_pixels_for_one() {
    for (shorter, reduction) in
        [(30, 1), (256, 1), (511, 1), (512, 2), (1023, 2), (1024, 4), (2047, 4), (2048, 8), (3000, 8)]
    {
        let image = DynamicImage::new_rgb8(shorter + 100, shorter);
        for format in [ImageFormat::Png, ImageFormat::Jpeg] {
            let (found, _) = distance_with_detail_for(32, &encoded(&image, format));
            assert_eq!(found, reduction, "{format:?}, {shorter} pixels");
        }
        let (found, _) = distance_with_detail_for(32, &encoded(&image, ImageFormat::Bmp));
        assert_eq!(found, 1, "BMP cannot be reduced");
    }
}

#[test]
fn the_model_sees_the_same_of_a_reduced_image() {
    // Symmetric filters of any width agree on a ramp. What is left: a rounding of block means and four of the resizing,
    // half a step each, and at the edges half a block of the slope, below one step.
    let ramp = RgbImage::from_fn(2100, 1500, |x, y| Rgb([(x * 255 / 2100) as u8, (y * 255 / 1500) as u8, 128]));
    let ramp = DynamicImage::ImageRgb8(ramp);
    let (reduction, worst) = distance_with_detail_for(32, &encoded(&ramp, ImageFormat::Png));
    assert!(reduction == 4 && worst <= 3, "PNG at 1/{reduction}: {worst}");
    // JPEG decoders differ by two steps more.
    let (reduction, worst) = distance_with_detail_for(32, &encoded(&ramp, ImageFormat::Jpeg));
    assert!(reduction == 4 && worst <= 5, "JPEG at 1/{reduction}: {worst}");
}

#[test]
fn what_cannot_be_reduced_is_refused_for_want_of_memory() {
    let bytes = fixture("lossy.webp");
    let limits = DecodeLimits {
        max_bytes: probe(&bytes, &DecodeLimits::default()).unwrap().decode_bytes_upper_bound - 1,
        ..DecodeLimits::default()
    };
    assert!(matches!(decode(&bytes, &limits), Err(ImageError::TooMuchMemory { .. })));
}

#[test]
fn what_is_not_an_image_is_told_apart() {
    let limits = DecodeLimits::default();
    let refuse = |bytes: &[u8]| decode(bytes, &limits).unwrap_err();
    assert!(matches!(refuse(b""), ImageError::Empty));
    assert!(matches!(refuse(b"Dear sir or madam"), ImageError::NotAnImage));
    let names: [(&[u8], &str); 13] = [
        (b"II*\0\x08\0\0\0", "TIFF"),
        (b"MM\0*\0\0\0\x08", "TIFF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x1Cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"\0\0\0\x18ftypisom\0\0\0\0mp41avc1", "a video"),
        (b"\xFF\x0A\xFA\x1F", "JPEG XL"),
        (b"\0\0\0\x0CJXL \r\n\x87\n", "JPEG XL"),
        (b"%PDF-1.7", "PDF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\xEF\xBB\xBF<?xml version='1.0'?>\n<!-- drawn -->\n<svg/>", "SVG"),
        (b"\n <!DOCTYPE html><html><body><svg/>", "HTML"),
        (b"<html lang='en'>", "HTML"),
    ];
    for (bytes, name) in names {
        let error = refuse(bytes);
        assert!(matches!(error, ImageError::UnsupportedFormat { format } if format == name), "{name}: {error}");
    }
    assert!(matches!(refuse(&fixture("cmyk.jpg")), ImageError::Cmyk));
    for zero in [png_header(0, 5), png_header(5, 0), b"GIF89a\0\0\0\0\0\0\0".to_vec()] {
        let error = refuse(&zero);
        assert!(matches!(error, ImageError::ZeroSized { .. } | ImageError::Truncated { .. }), "{error}");
    }
}

#[test]
fn truncated_images_are_refused() {
    let photo = DynamicImage::ImageRgb8(photo());
    let formats = [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::Gif, ImageFormat::Bmp, ImageFormat::WebP];
    for format in formats {
        let whole = encoded(&photo, format);
        // The trailer of a PNG or GIF carries no pixels; a file that lacks only that may be accepted.
        for length in (1..whole.len() * 9 / 10).step_by(whole.len() / 97 + 1) {
            let result = decode(&whole[..length], &DecodeLimits::default());
            assert!(result.is_err(), "{format:?} cut to {length} of {} bytes was accepted", whole.len());
        }
    }
}

/// A JPEG's bytes up to its end marker.
fn without_end(jpeg: &[u8]) -> &[u8] {
    jpeg.strip_suffix(&[0xFF, 0xD9]).unwrap()
}

#[test]
fn a_jpeg_that_lacks_a_block_is_refused_at_every_scale_whatever_follows() {
    let photo = DynamicImage::ImageRgb8(photo());
    let baseline = encoded(&photo, ImageFormat::Jpeg);
    let scan = baseline.windows(2).position(|pair| pair == [0xFF, 0xDA]).unwrap() + 14;
    let progressive = fixture("progressive-large.jpg");
    let last_scan = progressive.windows(2).rposition(|pair| pair == [0xFF, 0xDA]).unwrap() + 10;
    for (whole, scan) in [(&baseline, scan), (&progressive, last_scan)] {
        let data = without_end(whole);
        let next = [&[0xFF, 0xD9][..], whole].concat();
        let followers: [&[u8]; 4] = [b"", &[0xFF, 0xD9], whole, &next];
        for limits in [DecodeLimits::default(), DecodeLimits { detail: 1, ..DecodeLimits::default() }] {
            let expected = decode(whole, &limits).unwrap();
            for follower in followers {
                // The last byte holds a bit of the last block.
                for end in (scan..data.len()).step_by(53).chain([data.len() - 1]) {
                    // A lone 0xFF makes a marker of what follows.
                    let cut = if data[end - 1] == 0xFF { &data[..end - 1] } else { &data[..end] };
                    let error = decode(&[cut, follower].concat(), &limits).unwrap_err();
                    let told = matches!(error, ImageError::MissingBlocks { .. } | ImageError::Truncated { .. });
                    assert!(told, "{} of {} bytes, then {}: {error}", cut.len(), data.len(), follower.len());
                }
                // All blocks are there.
                assert!(decode(&[data, follower].concat(), &limits).unwrap() == expected);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn damaged_images_never_panic(
        which in 0usize..8,
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let photo = DynamicImage::ImageRgb8(RgbImage::from_fn(23, 17, |x, y| Rgb([x as u8 * 9, y as u8 * 11, 77])));
        let mut bytes = match which {
            0 => encoded(&photo, ImageFormat::Jpeg),
            1 => encoded(&photo, ImageFormat::Png),
            2 => encoded(&photo, ImageFormat::Gif),
            3 => encoded(&photo, ImageFormat::Bmp),
            4 => encoded(&photo, ImageFormat::WebP),
            5 => fixture("progressive.jpg"),
            6 => fixture("lossy.webp"),
            _ => fixture("palette.png"),
        };
        for (index, byte) in edits {
            let at = index.index(bytes.len());
            bytes[at] = byte;
        }
        // Whole, and as small as can be.
        for limits in [DecodeLimits::default(), DecodeLimits { detail: 1, ..DecodeLimits::default() }] {
            if let Ok(image) = decode(&bytes, &limits) {
                prop_assert!(image.width() > 0 && image.height() > 0);
            }
        }
    }

    #[test]
    fn any_size_preprocesses_to_the_models(width in 1u32..70, height in 1u32..70, side in 1usize..40, grey: u8) {
        // Weights sum to one but for rounding in the 22nd bit, so a flat image stays flat.
        let image = RgbImage::from_pixel(width, height, Rgb([grey, 255, 0]));
        let fitted = Preprocess::default().fit(&image, side);
        prop_assert_eq!(fitted.len(), side * side * 3);
        prop_assert!(fitted.chunks_exact(3).all(|pixel| pixel == [grey, 255, 0]));
    }
}
