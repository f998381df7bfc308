//! What decoding takes, for each file and the inputs of the two shipped models, as the server does it:
//!
//!     cargo run --release -p model-core --example decode -- photo.jpg drawing.png

use std::time::{Duration, Instant};

use model_core::image::{DecodeLimits, Preprocess, decode_picture, probe};

fn main() {
    for path in std::env::args().skip(1) {
        for (side, reduction) in [(32, 8.0), (192, 2.0)] {
            match figures(&path, side, reduction) {
                Ok(line) => println!("{path} for {side} x {side}: {line}"),
                Err(error) => println!("{path} for {side} x {side}: {error}"),
            }
        }
    }
}

fn figures(path: &str, side: usize, reduction: f32) -> Result<String, Box<dyn std::error::Error>> {
    let bytes = std::fs::read(path)?;
    // The server's default.
    let preprocess = Preprocess { reduction, ..Preprocess::default() };
    let limits = DecodeLimits { max_bytes: 60 << 20, ..DecodeLimits::default() }.for_input(&preprocess, side);
    let info = probe(&bytes, &limits)?;
    let mut best = Duration::MAX;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(1) {
        let begun = Instant::now();
        decode_picture(&bytes, &limits, &|| false)?;
        best = best.min(begun.elapsed());
    }
    let (scale, memory) = (info.reduction, info.decode_bytes_upper_bound as f64 / 1e6);
    let (width, height, time) = (info.width, info.height, best.as_secs_f64() * 1e3);
    Ok(format!("{width}x{height} at 1/{scale}, {time:.2} ms, counted with {memory:.1} MB"))
}
