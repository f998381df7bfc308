//! `butterflyvit teach`: a folder of images by class becomes an expert set that is served.

mod features;
mod images;
mod place;
mod progress;
mod report;
mod send;

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail};
use model_core::artifact::read_expert_set;
use model_core::artifact::store_layout::{NAME_RULE, is_valid_name};
use model_core::config::ExpertConfig;
use model_core::engine::ExpertSet;
use model_core::image::View;
use teaching::{Base, Examples, Options, Taught, teach};

use super::remote::Remote;
use crate::config::TeachArgs;
use crate::fitting::features::Extractor;
use features::extract;
use images::Images;
use place::{Lender, Place, Source};
use progress::Progress;
use report::{Copied, Outcome};

/// Teaches a set and puts it into the store.
///
/// # Errors
/// Names what is wrong with folder, backbone or store; nothing is written then.
pub fn run(args: &TeachArgs) -> anyhow::Result<ExitCode> {
    if !is_valid_name(&args.set) {
        bail!("`{}` is no name of a set: {NAME_RULE}", args.set);
    }
    // Before minutes of work: a server that is not there is said at once.
    let remote = args.server.as_deref().map(|url| {
        let remote = Remote::new(url, args.tls_cert.as_deref(), args.admin_key_file.as_deref())?;
        let version = send::next_version(&remote, &args.set)?;
        anyhow::Ok((url, remote, version))
    });
    let remote = remote.transpose()?;
    let place = Place::new(args.store.as_deref());
    let source = place.backbone(args.backbone.as_deref())?;
    let lender = place.lender(args.base.as_deref(), &args.set, &source)?;
    let images = Images::list(&args.folder)?;
    let view = View { crop: args.crop_shares()?, fit: args.fit.unwrap_or_default() };
    let progress = Progress::new();
    let threads = args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()));
    let extractor =
        Extractor::new(Arc::clone(&source.backbone), lender.as_ref().map(|lender| Arc::clone(&lender.set)), view)?;
    let found = extract(&extractor, &images, threads, &progress)?;
    progress.done();
    // Before anything is refused for want of images: it may be why.
    for sentence in &found.left_out {
        eprintln!("butterflyvit: left out: {sentence}");
    }

    let config = source.backbone.config();
    let examples = Examples {
        features: &found.features,
        views: found.views,
        d_model: config.d_model,
        labels: &found.labels,
        classes: &found.classes,
    };
    let options = Options { threads, ..Options::default() };
    let background = source.weights_background.as_ref();
    let taught = teach(&examples, background, &options, &mut |share| progress.show("fitting", share), &|| false)?;
    progress.done();
    let report = taught.report.clone();
    let base = Base {
        backbone: config.shape(),
        backbone_digest: source.backbone.digest(),
        experts: lender.as_ref().map_or(ExpertConfig::NONE, |lender| lender.descriptor.experts.clone()),
        borrowed_experts: lender.as_ref().map(|lender| lender.descriptor.digest),
        view,
    };
    let bytes = artifact(taught, &args.set, base, &source, lender.as_ref())?;
    let (place, version, copied) = match remote {
        Some((url, remote, version)) => {
            send::upload(&remote, &args.set, version, &bytes)?;
            (format!("{}/classify/{}", url.trim_end_matches('/'), args.set), version, Copied::default())
        }
        None => {
            let backbone = place.copy_backbone(&source)?;
            let base = lender.as_ref().map(|lender| place.copy_lender(lender)).transpose()?.flatten();
            let copied = Copied { backbone, base };
            let (path, version) = place.put(&args.set, &bytes)?;
            (path.display().to_string(), version, copied)
        }
    };
    let outcome = Outcome { args, report: &report, found: &found, place, version, bytes: bytes.len(), copied };
    outcome.print().context("standard output")?;
    Ok(ExitCode::SUCCESS)
}

/// The bytes of a set that a server would load.
fn artifact(
    taught: Taught,
    name: &str,
    base: Base,
    source: &Source,
    lender: Option<&Lender>,
) -> anyhow::Result<Vec<u8>> {
    let bytes = taught.into_artifact(name, base).to_bytes()?;
    ExpertSet::from_artifact(read_expert_set(&bytes)?, &source.backbone, lender.map(|lender| &*lender.set))?;
    Ok(bytes)
}
