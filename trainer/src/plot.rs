//! What the pictures share: a font that travels with the binary, and the learning curve.

use std::path::Path;
use std::sync::Once;

use anyhow::{Context, Result, anyhow};
use image::RgbImage;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

use crate::diary::{Line, StepLine, Validation};

/// Family of every text in a picture.
pub const FONT: &str = "sans-serif";

/// Makes [`FONT`] known: machines without a desktop have no fonts of their own.
pub fn use_font() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let bytes = include_bytes!("../assets/DejaVuSans-subset.ttf");
        // Pictures are never worth failing for: without the font they have no text, and drawing says so.
        let _ = register_font(FONT, FontStyle::Normal, bytes);
    });
}

/// Draws with `draw` on a white picture of `width x height` and writes it to `path` as PNG.
pub fn png(
    path: &Path,
    (width, height): (u32, u32),
    draw: impl FnOnce(&DrawingArea<BitMapBackend<'_>, plotters::coord::Shift>) -> Result<()>,
) -> Result<()> {
    use_font();
    let mut pixels = vec![255; (width * height * 3) as usize];
    {
        let root = BitMapBackend::with_buffer(&mut pixels, (width, height)).into_drawing_area();
        draw(&root)?;
        root.present().map_err(drawing)?;
    }
    let image = RgbImage::from_raw(width, height, pixels).expect("the canvas has three bytes a pixel");
    image.save(path).with_context(|| format!("writing the picture {}", path.display()))
}

/// An error of the drawing library, whose own type borrows its canvas.
pub fn drawing(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("drawing: {error}")
}

/// Loss over accuracy, against epochs: the diary as a picture.
pub fn learning_curve(path: &Path, lines: &[Line]) -> Result<()> {
    let steps: Vec<StepLine> =
        lines.iter().filter_map(|l| if let Line::Step(l) = l { Some(*l) } else { None }).collect();
    let held_out: Vec<Validation> =
        lines.iter().filter_map(|l| if let Line::Validation(l) = l { Some(l.clone()) } else { None }).collect();
    let epochs = steps.last().map_or(1.0, |l| l.epoch);
    png(path, (1000, 800), |root| {
        let (upper, lower) = root.split_vertically(400);
        let trained = |value: fn(&StepLine) -> f64| steps.iter().map(|l| (l.epoch, value(l))).collect::<Vec<_>>();
        let measured =
            |value: fn(&Validation) -> f64| held_out.iter().map(|l| (l.epoch as f64, value(l))).collect::<Vec<_>>();
        chart(
            &upper,
            "cross-entropy",
            epochs,
            &[
                Series { name: "training (augmented)", points: trained(|l| l.cross_entropy), color: BLUE },
                Series { name: "held out", points: measured(|l| l.cross_entropy), color: RED },
            ],
        )?;
        chart(
            &lower,
            "share of images, %",
            epochs,
            &[
                Series { name: "training top-1 (augmented)", points: trained(|l| 100.0 * l.accuracy), color: BLUE },
                Series { name: "held-out top-1", points: measured(|l| 100.0 * l.top1), color: RED },
                Series { name: "held-out top-5", points: measured(|l| 100.0 * l.top5), color: MAGENTA },
            ],
        )
    })
}

struct Series {
    name: &'static str,
    points: Vec<(f64, f64)>,
    color: RGBColor,
}

fn chart(
    area: &DrawingArea<BitMapBackend<'_>, plotters::coord::Shift>,
    title: &str,
    epochs: f64,
    series: &[Series],
) -> Result<()> {
    let top = series.iter().flat_map(|s| &s.points).map(|p| p.1).filter(|v| v.is_finite()).fold(0.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .caption(title, (FONT, 18))
        .x_label_area_size(36)
        .y_label_area_size(52)
        .build_cartesian_2d(0.0..epochs.max(1e-9), 0.0..top.max(1e-9) * 1.05)
        .map_err(drawing)?;
    chart.configure_mesh().max_light_lines(1).x_desc("epoch").label_style((FONT, 13)).draw().map_err(drawing)?;
    for s in series.iter().filter(|s| !s.points.is_empty()) {
        let color = s.color;
        let line = LineSeries::new(s.points.iter().copied().filter(|p| p.1.is_finite()), color.stroke_width(2));
        let key = move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2));
        chart.draw_series(line).map_err(drawing)?.label(s.name).legend(key);
    }
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.4))
        .label_font((FONT, 13))
        .draw()
        .map_err(drawing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use model_core::image::{DecodeLimits, decode};

    #[test]
    fn a_diary_becomes_a_picture_and_so_does_an_empty_one() {
        let folder = tempfile::tempdir().unwrap();
        let step = |step| {
            let epoch = step as f64 / 10.0;
            Line::Step(StepLine {
                step,
                epoch,
                cross_entropy: 4.0 / (1.0 + epoch),
                accuracy: 0.1,
                ..StepLine::default()
            })
        };
        let lines: Vec<Line> = (1..50).map(step).collect();
        for lines in [&lines[..], &[]] {
            let path = folder.path().join("curve.png");
            learning_curve(&path, lines).unwrap();
            let image = decode(&std::fs::read(&path).unwrap(), &DecodeLimits::default()).unwrap();
            assert_eq!((image.width(), image.height()), (1000, 800));
            assert!(image.pixels().any(|p| p.0 == [0, 0, 255]) != lines.is_empty(), "the blue line");
        }
    }
}
