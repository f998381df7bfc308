//! `speed`: images/s of training.

use std::time::Duration;

use anyhow::Result;

use crate::cli::{SpeedArgs, threads};
use crate::recipe::Recipe;
use crate::speed;
use crate::terminal::print;

/// `speed`: images/s.
pub fn speed(args: &SpeedArgs) -> Result<()> {
    let mut recipe = Recipe::scratch(args.model.resolve()?.0);
    args.recipe.apply(&mut recipe);
    args.variant.apply(&mut recipe);
    let speed = speed::measure(&recipe, threads(args.threads), Duration::from_secs(args.seconds))?;
    print(&if args.json { serde_json::to_string_pretty(&speed)? + "\n" } else { speed.to_string() })
}
