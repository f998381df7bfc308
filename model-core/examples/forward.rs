//! What the model takes for one image of noise, on one thread:
//!
//!     cargo run --release -p model-core --example forward -- models/photo-backbone.safetensors models/imagenet.safetensors

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use model_core::engine::{Backbone, ExpertSet, Row, Session};
use rand::{Rng, SeedableRng, rngs::SmallRng};

fn main() -> Result<(), Box<dyn Error>> {
    let [backbone, set] =
        std::env::args().skip(1).collect::<Vec<_>>().try_into().map_err(|_| "backbone and set, please")?;
    let backbone = Arc::new(Backbone::from_bytes(&std::fs::read(backbone)?)?);
    let set = ExpertSet::from_bytes(&std::fs::read(set)?, &backbone)?;
    let mut rng = SmallRng::seed_from_u64(1);
    let pixels: Vec<f32> = (0..backbone.pixels_len()).map(|_| rng.random_range(-1.0..1.0)).collect();
    let mut logits = vec![0.0; set.labels().len()];
    let mut session = Session::new(&backbone, 1, 1);
    let mut times = Vec::new();
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(2) {
        let begun = Instant::now();
        session.forward(&mut [Row {
            set: &set,
            pixels: &pixels,
            logits: &mut logits,
            routing: None,
            features: None,
        }])?;
        times.push(begun.elapsed());
    }
    times.sort();
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    println!("{}: best {:.3} ms, median {:.3} ms", backbone.isa(), ms(times[0]), ms(times[times.len() / 2]));
    Ok(())
}
