//! Files of the kinds that cameras and attackers send: what each gives, against libjpeg-turbo and Pillow where they can
//! say. `cjpeg`, `djpeg` and Pillow may be missing on a developer's machine, not where `CI` is set.

use std::process::Command;

use image::{DynamicImage, ImageFormat, Rgb, RgbImage};
use model_core::image::{DecodeLimits, ImageError, Preprocess, decode, decode_picture, probe};
use model_core::random::SplitMix64;

/// What a file of `tests/pictures` gives.
enum Gives {
    /// The pixels of another file.
    Same(&'static str),
    /// Those of another file, turned to the right.
    Turned(&'static str),
    /// An image of this size.
    Size(u32, u32),
    /// An error with these words.
    Error(&'static str),
}

fn read(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/tests/pictures/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

#[test]
fn files_that_went_wrong_give_what_they_should() {
    const REFERENCE: &str = "jpeg_interleaved_420_reference.jpg";
    let cases = [
        (REFERENCE, Gives::Size(300, 241)),
        ("jpeg_noninterleaved_420.jpg", Gives::Same(REFERENCE)),
        ("jpeg_noninterleaved_444_restart5.jpg", Gives::Size(300, 241)),
        ("jpeg_cut_at_75pct_with_end_marker.jpg", Gives::Error("truncated")),
        ("jpeg_mjpeg_frame_without_huffman_tables.jpg", Gives::Same(REFERENCE)),
        ("jpeg_mjpeg_avi1_without_huffman_tables_ok.jpg", Gives::Same(REFERENCE)),
        ("jpeg_orientation6_as_LONG.jpg", Gives::Turned(REFERENCE)),
        ("jpeg_progressive_4000x3000_420.jpg", Gives::Size(4000, 3000)),
        ("jpeg_complete_no_eoi_samsung_trailer.jpg", Gives::Same(REFERENCE)),
        ("png_no_iend_256.png", Gives::Size(256, 256)),
        ("black_on_transparent.png", Gives::Size(64, 64)),
        ("webp_panic-061537f8.webp", Gives::Error("WebP")),
        ("webp_panic-3a1ea389.webp", Gives::Error("WebP")),
        ("webp_panic-65101f04.webp", Gives::Error("WebP")),
        ("webp_panic-9b09f250.webp", Gives::Error("WebP")),
        ("webp_panic-ab58542a.webp", Gives::Error("WebP")),
        ("webp_panic-b7f067a6.webp", Gives::Error("WebP")),
        ("webp_panic-f82d6aea.webp", Gives::Error("WebP")),
    ];
    let folder = std::fs::read_dir(format!("{}/tests/pictures", env!("CARGO_MANIFEST_DIR"))).unwrap();
    assert_eq!(folder.count(), cases.len() + 1, "every file but the README has a case");
    let mut wrong = Vec::new();
    for (name, gives) in cases {
        let limits = DecodeLimits::default();
        let whole = |name: &str| DynamicImage::ImageRgb8(decode(&read(name), &limits).unwrap());
        let result = decode(&read(name), &limits);
        let right = match (&gives, &result) {
            (Gives::Same(other), Ok(image)) => *image == whole(other).into_rgb8(),
            (Gives::Turned(other), Ok(image)) => *image == whole(other).rotate90().into_rgb8(),
            (Gives::Size(width, height), Ok(image)) => image.dimensions() == (*width, *height),
            (Gives::Error(words), Err(error)) => error.to_string().contains(words),
            _ => false,
        };
        if !right {
            wrong.push(format!("{name}: {:?}", result.map(|image| image.dimensions())));
        }
        // Whole or reduced, a file is accepted or refused alike.
        let small = decode(&read(name), &DecodeLimits { detail: 1, ..limits });
        if small.is_ok() == matches!(gives, Gives::Error(_)) {
            wrong.push(format!("{name}, reduced: {:?}", small.map(|image| image.dimensions())));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Whether a program of the tests can be run; under CI it has to be.
fn available(program: &str, arguments: &[&str]) -> bool {
    let found = Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success());
    assert!(found || std::env::var_os("CI").is_none(), "{program} {arguments:?} cannot be run");
    if !found {
        eprintln!("skipped: {program} {arguments:?} cannot be run");
    }
    found
}

/// A drawing with slopes, edges, colours and some noise.
fn scene(width: u32, height: u32) -> RgbImage {
    let mut random = SplitMix64::at(7, 0);
    RgbImage::from_fn(width, height, |x, y| {
        let noise = (random.bits() >> 60) as i32;
        let disc =
            (x as i32 - width as i32 / 3).pow(2) + (y as i32 - height as i32 / 2).pow(2) < (height as i32 / 4).pow(2);
        let color = if disc { [230, 40, 60] } else { [(3 * x % 256) as i32, (2 * y % 200) as i32, 150] };
        Rgb(color.map(|sample: i32| (sample + noise).clamp(0, 255) as u8))
    })
}

fn to_ppm(image: &RgbImage) -> Vec<u8> {
    [format!("P6 {} {} 255\n", image.width(), image.height()).as_bytes(), image.as_raw()].concat()
}

fn output(program: &str, arguments: &[&str]) -> Option<Vec<u8>> {
    let output = Command::new(program).args(arguments).output().unwrap();
    output.status.success().then_some(output.stdout)
}

/// The pixels of `djpeg`, as RGB.
fn djpeg(file: &str, scale: u32) -> Option<RgbImage> {
    let ppm = output("djpeg", &["-pnm", "-scale", &format!("1/{scale}"), file])?;
    let header = String::from_utf8_lossy(&ppm[..32.min(ppm.len())]).into_owned();
    let mut words = header.split_ascii_whitespace();
    let (kind, width, height) = (words.next()?, words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let channels = if kind == "P6" { 3 } else { 1 };
    let samples = &ppm[ppm.len() - (width * height * channels) as usize..];
    let rgb = if channels == 3 { samples.to_vec() } else { samples.iter().flat_map(|&grey| [grey; 3]).collect() };
    RgbImage::from_raw(width, height, rgb)
}

#[test]
fn every_layout_of_jpeg_equals_libjpeg_turbo_to_the_last_bit() {
    if !(available("cjpeg", &["-version"]) && available("djpeg", &["-version"])) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (input, file, script) = (path("input.ppm"), path("file.jpg"), path("scans"));
    // Luma finer than colour, as fine, coarser, and a component of its own each; grey.
    let samplings = [
        "1x1",
        "2x1",
        "1x2",
        "2x2",
        "4x1",
        "1x4",
        "4x2",
        "2x4",
        "1x1,2x2,2x2",
        "1x1,2x1,2x1",
        "2x2,2x1,1x2",
        "1x1,1x2,1x2",
        "2x2,1x1,2x2",
        "1x2,1x1,1x1",
        "2x1,1x2,1x1",
        "grey",
    ];
    // One scan, one for each component, and mixtures; progressive by default and with bits of means sent one by one.
    let scans = [
        "",
        "0;\n1;\n2;\n",
        "0;\n1 2;\n",
        "0 1;\n2;\n",
        "-progressive",
        "0 1 2: 0-0, 0, 2;\n0 1 2: 0-0, 2, 1;\n0 1 2: 0-0, 1, 0;\n0: 1-63, 0, 0;\n1: 1-5, 0, 1;\n1: 6-63, 0, 0;\n\
         1: 1-5, 1, 0;\n2: 1-63, 0, 3;\n2: 1-63, 3, 2;\n2: 1-63, 2, 1;\n2: 1-63, 1, 0;\n",
    ];
    let restarts: [&[&str]; 3] = [&[], &["-restart", "1"], &["-restart", "5B"]];
    let (mut compared, mut wrong) = (0, Vec::new());
    for (width, height) in [(1, 1), (17, 9), (63, 65), (300, 241)] {
        std::fs::write(&input, to_ppm(&scene(width, height))).unwrap();
        for (sampling, scan, restart) in samplings
            .iter()
            .flat_map(|sampling| scans.iter().map(move |scan| (*sampling, *scan)))
            .flat_map(|(sampling, scan)| restarts.iter().map(move |restart| (sampling, scan, *restart)))
        {
            let mut arguments = vec!["-quality", "85", "-outfile", &file];
            arguments.extend(restart);
            match sampling {
                "grey" => arguments.push("-grayscale"),
                sampling => arguments.extend(["-sample", sampling]),
            }
            match scan {
                "" => {}
                "-progressive" => arguments.push(scan),
                scans if sampling != "grey" => {
                    std::fs::write(&script, scans).unwrap();
                    arguments.extend(["-scans", &script]);
                }
                _ => continue,
            }
            arguments.push(&input);
            // The encoder refuses units of more than ten blocks.
            if output("cjpeg", &arguments).is_none() {
                continue;
            }
            let bytes = std::fs::read(&file).unwrap();
            for reduction in [1, 2, 4, 8] {
                let limits = DecodeLimits { detail: (width.min(height) / reduction).max(1), ..DecodeLimits::default() };
                if probe(&bytes, &limits).unwrap().reduction != reduction {
                    continue;
                }
                let case = format!("{width}x{height} at 1/{reduction}, {sampling}, {scan:?}, {restart:?}");
                let expected = djpeg(&file, reduction).unwrap_or_else(|| panic!("djpeg refuses {case}"));
                compared += 1;
                match decode(&bytes, &limits) {
                    Ok(image) if image == expected => {}
                    Ok(_) => wrong.push(case),
                    Err(error) => wrong.push(format!("{case}: {error}")),
                }
            }
        }
    }
    eprintln!("{compared} files compared");
    assert!(compared > 2000, "{compared} files are not the layouts that this test is about");
    assert!(wrong.is_empty(), "{} of {compared}:\n{}", wrong.len(), wrong.join("\n"));
}

/// EXIF data whose one field is the orientation.
fn exif(orientation: u16, big_endian: bool, long: bool) -> Vec<u8> {
    let u16 = |value: u16| if big_endian { value.to_be_bytes() } else { value.to_le_bytes() };
    let u32 = |value: u32| if big_endian { value.to_be_bytes() } else { value.to_le_bytes() };
    let value = if long { u32(orientation.into()).to_vec() } else { [u16(orientation), [0, 0]].concat() };
    let head = [if big_endian { b"MM" } else { b"II" }, &u16(42)[..], &u32(8), &u16(1)].concat();
    [head, [u16(0x0112), u16(if long { 4 } else { 3 })].concat(), u32(1).to_vec(), value, vec![0; 4]].concat()
}

fn app1(content: &[u8]) -> Vec<u8> {
    [&[0xFF, 0xE1][..], &(content.len() as u16 + 2).to_be_bytes(), content].concat()
}

/// After the start-of-image marker.
fn into_jpeg(jpeg: &[u8], segments: &[&[u8]]) -> Vec<u8> {
    let segments: Vec<u8> = segments.iter().flat_map(|content| app1(content)).collect();
    [&jpeg[..2], &segments, &jpeg[2..]].concat()
}

fn into_png(png: &[u8], exif: &[u8]) -> Vec<u8> {
    let chunk = [&b"eXIf"[..], exif].concat();
    let crc = chunk.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0xEDB8_8320 } else { 0 })
    });
    // After the signature and the header.
    [&png[..33], &(exif.len() as u32).to_be_bytes(), &chunk, &(!crc).to_be_bytes(), &png[33..]].concat()
}

fn webp_chunk(kind: &[u8; 4], content: &[u8]) -> Vec<u8> {
    [kind, &(content.len() as u32).to_le_bytes()[..], content, &[0][..content.len() % 2]].concat()
}

fn webp_file(chunks: &[Vec<u8>]) -> Vec<u8> {
    let content = [&b"WEBP"[..], &chunks.concat()].concat();
    [&b"RIFF"[..], &(content.len() as u32).to_le_bytes(), &content].concat()
}

fn webp_header(flags: u8, width: u32, height: u32) -> Vec<u8> {
    let sides = [&(width - 1).to_le_bytes()[..3], &(height - 1).to_le_bytes()[..3]].concat();
    webp_chunk(b"VP8X", &[&[flags, 0, 0, 0], &sides[..]].concat())
}

fn into_webp(webp: &[u8], exif: &[u8], (width, height): (u32, u32)) -> Vec<u8> {
    webp_file(&[webp_header(0x08, width, height), webp[12..].to_vec(), webp_chunk(b"EXIF", exif)])
}

fn encoded(image: &RgbImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// Every container with EXIF of an orientation, by name.
fn with_orientation(orientation: u16) -> Vec<(String, Vec<u8>)> {
    let scene = scene(40, 24);
    let (jpeg, png) = (encoded(&scene, ImageFormat::Jpeg), encoded(&scene, ImageFormat::Png));
    let webp = encoded(&scene, ImageFormat::WebP);
    let mut files = Vec::new();
    for (big_endian, long) in [(false, false), (true, false), (false, true), (true, true)] {
        let plain = exif(orientation, big_endian, long);
        let prefixed = [b"Exif\0\0", &plain[..]].concat();
        let kind =
            format!("{orientation}{}{}", if big_endian { "-MM" } else { "-II" }, if long { "-LONG" } else { "" });
        files.extend([
            (format!("{kind}.jpg"), into_jpeg(&jpeg, &[&prefixed])),
            (format!("{kind}-after-xmp.jpg"), into_jpeg(&jpeg, &[b"http://ns.adobe.com/xap/1.0/\0<x/>", &prefixed])),
            (format!("{kind}.png"), into_png(&png, &plain)),
            (format!("{kind}.webp"), into_webp(&webp, &plain, (40, 24))),
            (format!("{kind}-prefixed.webp"), into_webp(&webp, &prefixed, (40, 24))),
        ]);
    }
    files
}

#[test]
fn every_orientation_in_every_container_turns_as_exif_says() {
    for orientation in 1..=8u16 {
        let turn = image::metadata::Orientation::from_exif(orientation as u8).unwrap();
        for (name, bytes) in with_orientation(orientation) {
            let format = image::guess_format(&bytes).unwrap();
            let mut upright = image::load_from_memory_with_format(&encoded(&scene(40, 24), format), format).unwrap();
            if format == ImageFormat::Jpeg {
                // Another decoder than the one that is tested.
                upright = DynamicImage::ImageRgb8(
                    decode(&encoded(&scene(40, 24), format), &DecodeLimits::default()).unwrap(),
                );
            }
            upright.apply_orientation(turn);
            assert!(decode(&bytes, &DecodeLimits::default()).unwrap() == upright.to_rgb8(), "{name}");
        }
    }
}

#[test]
fn the_first_exif_segment_that_tells_an_orientation_counts() {
    let jpeg = encoded(&scene(40, 24), ImageFormat::Jpeg);
    let segment = |orientation| [b"Exif\0\0", &exif(orientation, true, false)[..]].concat();
    let silent = [&b"Exif\0\0MM\0*\0\0\0\x08\0\0"[..], &[0; 4]].concat();
    let size = |segments: &[&[u8]]| decode(&into_jpeg(&jpeg, segments), &DecodeLimits::default()).unwrap().dimensions();
    assert_eq!(size(&[&silent, &segment(6)]), (24, 40));
    assert_eq!(size(&[b"Exif\0\0broken", &segment(6)]), (24, 40));
    assert_eq!(size(&[&segment(3), &segment(6)]), (40, 24));
}

#[test]
fn pillow_turns_images_alike() {
    const PROGRAM: &str = "import sys\nfrom PIL import Image, ImageOps\nfor name in sys.argv[1:]:\n    \
                           ImageOps.exif_transpose(Image.open(name)).convert('RGB').save(name + '.ppm')";
    if !available("/usr/bin/python3", &["-c", "import PIL"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let files: Vec<(String, Vec<u8>)> = (1..=8).flat_map(with_orientation).collect();
    for (name, bytes) in &files {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    let paths = files.iter().map(|(name, _)| folder.path().join(name));
    let status = Command::new("/usr/bin/python3").arg("-c").arg(PROGRAM).args(paths).status().unwrap();
    assert!(status.success());
    for (name, bytes) in &files {
        let expected = std::fs::read(folder.path().join(format!("{name}.ppm"))).unwrap();
        let ours = to_ppm(&decode(bytes, &DecodeLimits::default()).unwrap());
        // Headers differ by white space.
        let samples = 40 * 24 * 3;
        let header = String::from_utf8_lossy(&expected[..expected.len() - samples]).replace('\n', " ");
        assert_eq!(header.trim(), String::from_utf8_lossy(&ours[..ours.len() - samples]).trim(), "{name}");
        assert!(expected[expected.len() - samples..] == ours[ours.len() - samples..], "{name}");
    }
}

/// A progressive file of one component, with scans as given: (first and last coefficient, high and low bit).
fn progressive(side: u16, scans: &[(u8, u8, u8, u8)]) -> Vec<u8> {
    let [high, low] = side.to_be_bytes();
    let mut bytes = vec![0xFF, 0xD8, 0xFF, 0xDB, 0, 67, 0];
    bytes.extend([1; 64]);
    bytes.extend([0xFF, 0xC2, 0, 11, 8, high, low, high, low, 1, 1, 0x11, 0]);
    // One code of one bit each: a difference of nothing, and the end of a run of 2^14 blocks.
    for (table, symbol) in [(0x00, 0x00), (0x10, 0xE0)] {
        bytes.extend([&[0xFF, 0xC4, 0, 20, table, 1][..], &[0; 15], &[symbol]].concat());
    }
    let blocks = (usize::from(side) / 8).pow(2);
    for &(start, end, high, low) in scans {
        bytes.extend([0xFF, 0xDA, 0, 8, 1, 1, 0x00, start, end, high << 4 | low]);
        let bits = if start == 0 { blocks } else { 15 * blocks.div_ceil(1 << 14) };
        bytes.extend(vec![0; bits.div_ceil(8)]);
    }
    bytes.extend([0xFF, 0xD9]);
    bytes
}

#[test]
fn scans_are_counted_and_each_has_to_send_something_new() {
    let refused = |scans: &[(u8, u8, u8, u8)]| decode(&progressive(1024, scans), &DecodeLimits::default()).unwrap_err();
    let means = (0, 0, 0, 0);
    assert!(decode(&progressive(1024, &[means, (1, 63, 0, 0)]), &DecodeLimits::default()).is_ok());
    for bomb in [[means, means], [means, (1, 63, 1, 0)], [(0, 0, 0, 1), means], [(1, 63, 0, 0), means]] {
        assert!(matches!(refused(&bomb), ImageError::Broken { .. }), "{bomb:?}");
    }
    // Each bit of each coefficient by itself.
    let details = (1..64).flat_map(|k| (0..13).rev().map(move |low| (k, k, if low == 12 { 0 } else { low + 1 }, low)));
    let all: Vec<_> = std::iter::once(means).chain(details).collect();
    assert!(refused(&all).to_string().contains("100 scans"));
}

#[test]
fn decoding_of_every_format_ends_once_it_is_stopped() {
    let scene = scene(1200, 900);
    let mut files: Vec<(String, Vec<u8>)> =
        [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::WebP, ImageFormat::Gif, ImageFormat::Bmp]
            .map(|format| (format!("{format:?}"), encoded(&scene, format)))
            .into();
    files.push(("progressive".into(), progressive(1024, &[(0, 0, 0, 1), (1, 63, 0, 0), (0, 0, 1, 0)])));
    for (name, bytes) in files {
        let asked = std::cell::Cell::new(0);
        let stops_after = |count: u32| {
            asked.set(0);
            let stopped = || asked.replace(asked.get() + 1) >= count;
            decode_picture(&bytes, &DecodeLimits::default(), &stopped)
        };
        stops_after(u32::MAX).unwrap();
        let most = asked.get();
        assert!(most >= 3, "{name} asks {most} times");
        for count in [0, 1, most / 2, most - 1] {
            assert!(matches!(stops_after(count), Err(ImageError::Stopped)), "{name} after {count} of {most}");
        }
    }
}

#[test]
fn photos_of_twelve_megapixels_pass_within_the_default_memory() {
    // The server's default, and the side of its model.
    let limits = DecodeLimits { max_bytes: 60 << 20, ..DecodeLimits::default() };
    let header = |width: u16, height: u16, luma: u8| {
        let mut bytes = vec![0xFF, 0xD8, 0xFF, 0xC2, 0, 17, 8];
        bytes.extend([height.to_be_bytes(), width.to_be_bytes()].concat());
        bytes.extend([3, 1, luma, 0, 2, 0x11, 1, 3, 0x11, 1]);
        bytes.extend([0xFF, 0xDA, 0, 12, 3, 1, 0, 2, 0, 3, 0, 0, 0, 0]);
        bytes
    };
    for side in [32, 192] {
        for (width, height) in [(4000, 3000), (4032, 3024), (3000, 4000)] {
            for luma in [0x22, 0x21, 0x12, 0x11] {
                let info = probe(&header(width, height, luma), &limits.for_input(&Preprocess::default(), side));
                assert!(info.is_ok(), "{width}x{height}, luma {luma:#x}, for {side}: {info:?}");
            }
        }
    }
    let limits = limits.for_input(&Preprocess::default(), 32);
    assert_eq!(decode(&read("jpeg_progressive_4000x3000_420.jpg"), &limits).unwrap().dimensions(), (500, 375));
}

/// Bits, the lowest of a byte first.
#[derive(Default)]
struct Bits(Vec<bool>);

impl Bits {
    fn put(&mut self, value: u32, count: u32) {
        self.0.extend((0..count).map(|i| value >> i & 1 == 1));
    }

    /// A code with a single symbol, which takes no bits.
    fn put_single(&mut self, symbol: u32) {
        self.put(0b101, 3);
        self.put(symbol, 8);
    }

    fn bytes(&self) -> Vec<u8> {
        self.0.chunks(8).map(|bits| (0..).zip(bits).map(|(i, &bit)| u8::from(bit) << i).sum()).collect()
    }
}

/// A lossless image of one colour whose squares have the code number 65,535, and whose file has as many.
fn huffman_bomb(side: u32) -> Vec<u8> {
    let mut bits = Bits::default();
    bits.put(0x2F, 8);
    bits.put(side - 1, 14);
    bits.put(side - 1, 14);
    bits.put(0, 4);
    // No transform, no cache; squares of 4 x 4, numbered in red and green.
    bits.put(0b100, 3);
    bits.put(0, 3);
    bits.put(0, 1);
    [255, 255, 0, 0, 0].into_iter().for_each(|symbol| bits.put_single(symbol));
    for _ in 0..65_536 {
        bits.put_single(0);
        for _ in 0..3 {
            // 256 codes of 8 bits: the one length has a code of none.
            bits.put(0, 1);
            bits.put(12 - 4, 4);
            (0..12).for_each(|i| bits.put(u32::from(i == 11), 3));
            bits.put(0, 1);
        }
        bits.put_single(0);
    }
    bits.bytes()
}

#[test]
fn a_webp_with_tables_without_end_is_refused() {
    let bomb = huffman_bomb(64);
    let alpha = [&[1][..], &bomb[5..]].concat();
    let lossy = std::fs::read(format!("{}/tests/fixtures/lossy.webp", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let animated = |width: u32, height: u32, content: Vec<u8>| {
        let sides = [&[0; 6][..], &(width - 1).to_le_bytes()[..3], &(height - 1).to_le_bytes()[..3]].concat();
        let frame = webp_chunk(b"ANMF", &[sides, vec![0; 4], content].concat());
        webp_file(&[webp_header(0x12, 320, 256), webp_chunk(b"ANIM", &[0; 6]), frame])
    };
    let files = [
        ("lossless", webp_file(&[webp_chunk(b"VP8L", &bomb)])),
        ("alpha", webp_file(&[webp_header(0x10, 320, 256), webp_chunk(b"ALPH", &alpha), lossy[12..].to_vec()])),
        ("frame", animated(64, 64, webp_chunk(b"VP8L", &bomb))),
        ("frame with alpha", animated(320, 256, [webp_chunk(b"ALPH", &alpha), lossy[12..].to_vec()].concat())),
    ];
    for (name, bytes) in files {
        let error = decode(&bytes, &DecodeLimits::default()).unwrap_err().to_string();
        assert!(error.contains("Huffman codes take too much memory"), "{name}: {error}");
    }
    let error =
        decode(&animated(16384, 16384, lossy[12..].to_vec()), &DecodeLimits::default()).unwrap_err().to_string();
    assert!(error.contains("another size than its frame"), "{error}");
    // And what is well lies on its canvas.
    let image = decode(&animated(320, 256, lossy[12..].to_vec()), &DecodeLimits::default()).unwrap();
    assert!(image == decode(&lossy, &DecodeLimits::default()).unwrap());
}
