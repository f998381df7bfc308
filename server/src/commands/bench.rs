//! `butterflyvit bench`: layer and model times on random weights, beside the dense experts that they replace.

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, bail};
use model_core::config::ViTConfig;
use model_core::engine::bench::{LayerReport, ModelReport, Options, Report, Timing};
use model_core::kernels::Isa;
use serde_json::json;

use crate::config::BenchArgs;

/// Times everything that `args` asks for and prints it.
///
/// # Errors
/// Names what cannot be timed.
pub fn run(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    let config = ViTConfig::preset(&args.preset).with_context(|| format!("there is no preset `{}`", args.preset))?;
    if args.threads == 0 || args.batch == 0 {
        bail!("--threads and --batch must be at least 1");
    }
    let options = Options {
        config,
        num_experts: args.experts.clone(),
        threads: args.threads,
        batch: args.batch,
        duration: args.duration,
        dense: !args.no_dense,
        isa: Isa::from_env()?,
    };
    let reports = model_core::engine::bench::run(&options)?;
    let mut out = std::io::stdout().lock();
    let printed = if args.json {
        let document = json!({
            "isa": options.isa.name(),
            "preset": args.preset,
            "threads": args.threads,
            "batch": args.batch,
            "config": options.config,
            "results": reports,
        });
        writeln!(out, "{document}")
    } else {
        print_text(&mut out, args, &options, &reports)
    };
    printed.context("standard output")?;
    Ok(ExitCode::SUCCESS)
}

fn print_text(out: &mut impl Write, args: &BenchArgs, options: &Options, reports: &[Report]) -> std::io::Result<()> {
    let (backbone, experts) = (&options.config.backbone, &options.config.experts);
    writeln!(
        out,
        "preset {}: {} layers, d_model {}, d_ff {}, {} tokens, top-{}; {}, {} threads, batches of {}",
        args.preset,
        backbone.num_layers,
        backbone.d_model,
        backbone.d_ff,
        backbone.num_tokens(),
        experts.top_k,
        options.isa,
        args.threads,
        args.batch,
    )?;
    for Report { num_experts, layer, dense_layer, model } in reports {
        writeln!(out, "\n{num_experts} experts")?;
        print_layer(out, "layer", layer)?;
        if let Some(dense) = dense_layer {
            print_layer(out, "dense f32", dense)?;
            writeln!(
                out,
                "  {:<10}{:.1} times faster, {:.0} times smaller",
                "ratio",
                dense.time.median_ms / layer.time.median_ms,
                dense.resident_bytes as f64 / layer.resident_bytes as f64
            )?;
        }
        print_model(out, model)?;
    }
    Ok(())
}

fn print_layer(out: &mut impl Write, name: &str, layer: &LayerReport) -> std::io::Result<()> {
    writeln!(
        out,
        "  {name:<10}{}  {:6.1} GMAC/s, reads {:.3} MB an image, holds {:.3} MB",
        milliseconds(&layer.time),
        layer.gmac_per_second,
        megabytes(layer.bytes_read),
        megabytes(layer.resident_bytes)
    )
}

fn print_model(out: &mut impl Write, model: &ModelReport) -> std::io::Result<()> {
    writeln!(
        out,
        "  {:<10}{}  {:6.1} GMAC/s, reads {:.3} MB an image, {:.1} images/s",
        "model",
        milliseconds(&model.time),
        model.gmac_per_second,
        megabytes(model.bytes_read_per_image),
        model.images_per_second
    )?;
    writeln!(
        out,
        "  {:<10}backbone {:.3} MB, expert set {:.3} MB, scratch {:.3} MB",
        "memory",
        megabytes(model.backbone_bytes),
        megabytes(model.expert_set_bytes),
        megabytes(model.session_bytes)
    )
}

fn milliseconds(time: &Timing) -> String {
    format!("{:9.3} ms (p95 {:9.3}, {} runs)", time.median_ms, time.p95_ms, time.runs)
}

/// In units of 10^6 bytes, as the paper counts.
fn megabytes(bytes: usize) -> f64 {
    bytes as f64 / 1e6
}
