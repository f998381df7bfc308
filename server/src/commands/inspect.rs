//! `butterflyvit inspect`: where the bytes of an artifact go.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use model_core::artifact::{Contents, Header};
use model_core::footprint::Footprint;
use serde_json::{Value, json};

use crate::config::InspectArgs;
use crate::sets::store;

/// Prints the footprint of a file, or of the embedded artifacts.
pub fn run(args: &InspectArgs) -> anyhow::Result<ExitCode> {
    let artifacts = match &args.file {
        Some(path) => {
            let name = path.display().to_string();
            let read = model_core::artifact::read_file(path).map_err(anyhow::Error::from);
            let artifact = read.and_then(|bytes| inspect(&bytes)).with_context(|| name.clone())?;
            vec![(name, artifact)]
        }
        None => store::embedded_bytes()
            .map(|(name, bytes)| Ok((format!("embedded {name}"), inspect(bytes)?)))
            .collect::<anyhow::Result<_>>()?,
    };
    let mut out = std::io::stdout().lock();
    for (name, artifact) in &artifacts {
        let printed =
            if args.json { print_json(&mut out, name, artifact) } else { print_text(&mut out, name, artifact) };
        printed.context("standard output")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Labels that are printed as text.
const SHOWN_LABELS: usize = 10;

/// What `teach` measured on images that it held out.
fn print_report(out: &mut impl Write, report: &Value) -> std::io::Result<()> {
    let number = |pointer: &str| report.pointer(pointer).and_then(Value::as_f64);
    let percent = |pointer: &str| number(pointer).map(|share| 100.0 * share);
    if let (Some(share), Some(low), Some(high), Some(of)) =
        (percent("/accuracy/share"), percent("/accuracy/low"), percent("/accuracy/high"), number("/accuracy/of"))
    {
        writeln!(out, "  right {share:.1}% of {of} held-out images (95% interval {low:.1} to {high:.1}%)")?;
    }
    if let (Some(threshold), Some(refused)) = (number("/unknown/threshold"), percent("/unknown/refused/share")) {
        writeln!(out, "  unknown from a distance of {threshold:.1}, which {refused:.1}% of its own images have")?;
    }
    Ok(())
}

struct Inspected {
    header: Header,
    footprint: Footprint,
}

/// Reads the whole artifact, so that what is printed is of a file that would load.
fn inspect(bytes: &[u8]) -> anyhow::Result<Inspected> {
    let header = Header::from_bytes(bytes)?;
    match header.contents {
        Contents::Backbone(_) => drop(model_core::artifact::read_backbone(bytes)?),
        Contents::ExpertSet(_) => drop(model_core::artifact::read_expert_set(bytes)?),
    }
    let footprint = Footprint::of_artifact(&header.contents, header.file_bytes);
    Ok(Inspected { header, footprint })
}

fn print_json(out: &mut impl Write, file: &str, artifact: &Inspected) -> std::io::Result<()> {
    let Inspected { header, footprint } = artifact;
    let (config, more) = match &header.contents {
        Contents::Backbone(backbone) => (
            json!(backbone.config),
            json!({
                "preprocess": backbone.preprocess,
                "encoding": backbone.encoding,
                "background": backbone.background,
                "card": backbone.card,
            }),
        ),
        Contents::ExpertSet(set) => (
            json!({ "experts": set.config, "backbone": set.backbone }),
            json!({
                "backbone_digest": set.backbone_digest,
                "borrowed_experts": set.borrowed_experts,
                "encoding": set.encoding,
                "num_classes": set.labels.len(),
                "labels": set.labels,
                "temperature": set.temperature,
                "familiarity": set.familiarity,
                "view": set.view,
                "report": set.report,
                "card": set.card,
            }),
        ),
    };
    let (disk, resident) = footprint.totals();
    let document = json!({
        "file": file,
        "kind": header.contents.kind(),
        "name": header.name,
        "digest": header.digest,
        "file_bytes": header.file_bytes,
        "disk_bytes": disk,
        "resident_bytes": resident,
        "config": config,
        "details": more,
        "footprint": footprint,
        "training": header.training,
    });
    writeln!(out, "{document}")
}

fn print_text(out: &mut impl Write, file: &str, artifact: &Inspected) -> std::io::Result<()> {
    let Inspected { header, footprint } = artifact;
    writeln!(out, "{file}: {} `{}`", header.contents.kind(), header.name)?;
    writeln!(out, "  digest {}", header.digest)?;
    let card = match &header.contents {
        Contents::Backbone(backbone) => &backbone.card,
        Contents::ExpertSet(set) => {
            writeln!(out, "  backbone {}", set.backbone_digest)?;
            if let Some(lender) = set.borrowed_experts {
                writeln!(out, "  experts of {lender}")?;
            }
            let shown = set.labels.iter().take(SHOWN_LABELS).map(String::as_str).collect::<Vec<_>>().join(", ");
            let more = if set.labels.len() > SHOWN_LABELS { ", ..." } else { "" };
            writeln!(out, "  {} labels: {shown}{more}", set.labels.len())?;
            print_report(out, &set.report)?;
            &set.card
        }
    };
    if let Some(card) = card {
        for (what, text) in [("licence", &card.licence), ("origin", &card.origin), ("data", &card.data)] {
            writeln!(out, "  {what} {}", text.replace('\n', "\n    "))?;
        }
    }
    writeln!(out, "{footprint}")
}
