//! The confusion matrix as a picture.

use std::path::Path;

use anyhow::{Result, ensure};
use plotters::prelude::*;

use super::Tally;
use crate::plot::{FONT, drawing, png};

/// More labels than this are too small to read, so classes get their number instead.
const MAX_NAMED: usize = 40;

/// Rows are what images show, columns what they were taken for; dark is often. Right answers are on the diagonal.
///
/// # Errors
/// When there are more classes than a picture of a sensible size shows, or it cannot be written.
pub fn confusion_picture(path: &Path, tally: &Tally, names: &[String]) -> Result<()> {
    /// At four pixels a class a picture of 64 million.
    const MOST: usize = 2000;
    let classes = tally.classes;
    ensure!(classes <= MOST, "a confusion matrix of {classes} classes is too large to draw; at most {MOST} fit");
    let cell = (900 / classes as i32).clamp(4, 40);
    let margin = if classes <= MAX_NAMED { 150 } else { 40 };
    let size = (margin + classes as i32 * cell + 20) as u32;
    png(path, (size, size), |root| {
        let by_label = tally.by_label();
        for (&(label, prediction), &count) in &tally.confusion {
            let (x, y) = (margin + prediction as i32 * cell, margin + label as i32 * cell);
            // The root makes rare confusions visible beside a strong diagonal.
            let share = (f64::from(count) / f64::from(by_label[label].0)).sqrt();
            let color = if label == prediction { RGBColor(20, 90, 160) } else { RGBColor(190, 30, 30) };
            let cell = Rectangle::new([(x, y), (x + cell - 1, y + cell - 1)], color.mix(share).filled());
            root.draw(&cell).map_err(drawing)?;
        }
        let edge = margin + classes as i32 * cell;
        root.draw(&Rectangle::new([(margin - 1, margin - 1), (edge, edge)], BLACK.mix(0.5))).map_err(drawing)?;
        let step = if classes <= MAX_NAMED { 1 } else { 10 };
        let style = (FONT, 12.min(cell.max(11))).into_font().color(&BLACK);
        for class in (0..classes).step_by(step) {
            let text = if classes <= MAX_NAMED { shortened(&names[class]) } else { class.to_string() };
            let centre = margin + class as i32 * cell + cell / 2;
            let (width, _) = root.estimate_text_size(&text, &style).map_err(drawing)?;
            root.draw_text(&text, &style, (margin - 6 - width as i32, centre - 6)).map_err(drawing)?;
            let upright = style.transform(FontTransform::Rotate270);
            root.draw_text(&text, &upright, (centre - 6, margin - 6)).map_err(drawing)?;
        }
        let legend = "rows: what it is; columns: what it was taken for";
        root.draw_text(legend, &style, (4, 4)).map_err(drawing)
    })
}

/// At most 18 characters.
fn shortened(name: &str) -> String {
    if name.chars().count() <= 18 { name.to_owned() } else { name.chars().take(17).chain(['~']).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model_core::config::ViTConfig;

    #[test]
    fn few_and_many_classes_fit() {
        let folder = tempfile::tempdir().unwrap();
        for classes in [1, 10, 120] {
            let mut config = ViTConfig::preset("tiny").unwrap();
            config.num_classes = classes;
            let names: Vec<String> = (0..classes).map(|i| format!("class with a long name {i}")).collect();
            confusion_picture(&folder.path().join("c.png"), &Tally::new(&config), &names).unwrap();
        }
    }
}
