//! `init`: random artifacts.

use anyhow::Result;
use model_core::image::Preprocess;
use serde_json::json;
use training::vit::ViT;

use crate::cli::InitArgs;
use crate::store::Store;
use crate::terminal::say;

/// `init`: a random backbone with random expert sets.
///
/// # Errors
/// When the configuration is invalid or a file cannot be written.
pub fn init(args: &InitArgs) -> Result<()> {
    let (mut config, preset) = args.model.resolve()?;
    if let Some(num_experts) = args.experts {
        config.experts.num_experts = num_experts;
        config.validate()?;
    }
    let name = args.name.clone().unwrap_or(preset);
    let store = Store::new(&args.store);
    let labels: Vec<String> = (0..config.num_classes).map(|class| format!("class {class}")).collect();
    let summary = json!({ "random": true, "seed": args.seed });
    let (backbone, first) = ViT::init(&config, args.seed)?.to_weights(&labels)?;
    let (path, digest) = store.write_backbone(&name, &backbone, &Preprocess::default(), &summary)?;
    say(&format!("backbone {}", path.display()));
    let mut set = first;
    for number in 0..args.sets {
        if number > 0 {
            set = ViT::init(&config, args.seed.wrapping_add(u64::from(number)))?.to_weights(&labels)?.1;
        }
        let set_name = format!("set-{number:04}");
        store.write_set(&set_name, 1, &set, (&backbone.config, digest), &summary)?;
    }
    say(&format!("{} expert sets in {}", args.sets, args.store.join("expert-sets").display()));
    Ok(())
}
