//! Times layer and model at the paper's shapes: `cargo run --release -p model-core --example layer_times [EXPERTS]`.

use std::time::Duration;

use model_core::bench::{Options, run};
use model_core::config::ViTConfig;
use model_core::kernels::Isa;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let num_experts = std::env::args().nth(1).map_or(Ok(64), |arg| arg.parse())?;
    let config = ViTConfig::preset("paper").ok_or("the preset is built in")?;
    let isa = Isa::from_env()?;
    let options = Options {
        config,
        num_experts: vec![num_experts],
        threads: 1,
        batch: 1,
        duration: Duration::from_secs(1),
        dense: true,
        isa,
    };
    println!("{isa}: {}", serde_json::to_string_pretty(&run(&options)?)?);
    Ok(())
}
