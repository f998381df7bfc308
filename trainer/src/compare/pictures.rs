//! What a comparison draws: accuracy against memory, memory against the number of experts, where routers send the
//! patches of an image, and how evenly they use their experts.

use std::path::Path;

use anyhow::Result;
use model_core::config::FeedForwardKind;
use plotters::coord::Shift;
use plotters::prelude::*;

use super::memory::ExpertMemory;
use super::{Outcome, Row};
use crate::plot::{FONT, drawing, png, use_font};

/// Series in the order they are drawn; more repeat.
const COLORS: [RGBColor; 6] = [
    RGBColor(31, 119, 180),
    RGBColor(214, 39, 40),
    RGBColor(44, 160, 44),
    RGBColor(148, 103, 189),
    RGBColor(255, 127, 14),
    RGBColor(90, 90, 90),
];

fn color(series: usize) -> RGBColor {
    COLORS[series % COLORS.len()]
}

/// Accuracy against the memory of the feed-forward layers, everything counted, with the range over seeds.
pub(super) fn accuracy_against_memory(path: &Path, rows: &[Row]) -> Result<()> {
    let kilobytes = |row: &Row| row.runtime_bytes / 1e3;
    let least = rows.iter().map(kilobytes).fold(f64::MAX, f64::min);
    let most = rows.iter().map(kilobytes).fold(f64::MIN, f64::max);
    let lowest = rows.iter().map(|row| 100.0 * row.top1_lowest).fold(f64::MAX, f64::min);
    let highest = rows.iter().map(|row| 100.0 * row.top1_highest).fold(f64::MIN, f64::max);
    let margin = (0.1 * (highest - lowest)).max(0.5);
    png(path, (900, 600), |root| {
        let mut chart = ChartBuilder::on(root)
            .margin(16)
            .caption("test accuracy against feed-forward memory", (FONT, 18))
            .x_label_area_size(40)
            .y_label_area_size(52)
            .build_cartesian_2d((0.7 * least..6.0 * most).log_scale(), lowest - margin..highest + margin)
            .map_err(drawing)?;
        let mut mesh = chart.configure_mesh();
        mesh.x_label_formatter(&|x| format!("{x:.0}"));
        mesh.max_light_lines(1).x_desc("kB, everything counted").y_desc("top-1 %").label_style((FONT, 13));
        mesh.draw().map_err(drawing)?;
        for (series, row) in rows.iter().enumerate() {
            let (x, color) = (kilobytes(row), color(series));
            let range = [(x, 100.0 * row.top1_lowest), (x, 100.0 * row.top1_highest)];
            chart.draw_series(LineSeries::new(range, color.stroke_width(2))).map_err(drawing)?;
            let dot = [Circle::new((x, 100.0 * row.top1), 5, color.filled())];
            let key = move |(x, y)| Circle::new((x + 8, y), 4, color.filled());
            chart.draw_series(dot).map_err(drawing)?.label(row.variant.name()).legend(key);
        }
        let mut labels = chart.configure_series_labels();
        labels.background_style(WHITE.mix(0.9)).border_style(BLACK.mix(0.4)).label_font((FONT, 13));
        labels.position(SeriesLabelPosition::LowerRight).draw().map_err(drawing)
    })
}

/// Memory against the number of experts, both axes logarithmic: what dense experts need, and what artifacts measure.
pub(super) fn memory_against_experts(path: &Path, points: &[ExpertMemory]) -> Result<()> {
    type Value = fn(&ExpertMemory) -> f64;
    let series: [(&str, Value); 4] = [
        ("dense fp32 experts and router (computed)", |p| p.dense_bytes),
        ("feed-forward layers, everything counted (artifact)", |p| p.feed_forward_bytes as f64),
        ("expert set's file", |p| p.set_file_bytes as f64),
        ("expert set resident in the engine", |p| p.set_resident_bytes as f64),
    ];
    let all = || points.iter().flat_map(|p| series.iter().map(move |(_, value)| value(p) / 1e3));
    let (least, most) = (all().fold(f64::MAX, f64::min), all().fold(f64::MIN, f64::max));
    let (first, last) = (points[0].num_experts as f64, points[points.len() - 1].num_experts as f64);
    png(path, (900, 600), |root| {
        let mut chart = ChartBuilder::on(root)
            .margin(16)
            .caption("memory against number of experts", (FONT, 18))
            .x_label_area_size(40)
            .y_label_area_size(64)
            .build_cartesian_2d((0.9 * first..1.1 * last).log_scale(), (0.5 * least..20.0 * most).log_scale())
            .map_err(drawing)?;
        let mut mesh = chart.configure_mesh();
        mesh.max_light_lines(1).x_desc("experts in each layer").y_desc("kB").label_style((FONT, 13));
        mesh.x_label_formatter(&|x| format!("{x:.0}")).y_label_formatter(&|y| format!("{y:.0}"));
        mesh.draw().map_err(drawing)?;
        for (i, (name, value)) in series.into_iter().enumerate() {
            let color = color(i);
            let line = points.iter().map(|p| (p.num_experts as f64, value(p) / 1e3));
            let key = move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2));
            let drawn = chart.draw_series(LineSeries::new(line.clone(), color.stroke_width(2)).point_size(3));
            drawn.map_err(drawing)?.label(name).legend(key);
        }
        let mut labels = chart.configure_series_labels();
        labels.background_style(WHITE.mix(0.9)).border_style(BLACK.mix(0.4)).label_font((FONT, 13));
        labels.position(SeriesLabelPosition::UpperLeft).draw().map_err(drawing)
    })
}

/// Side of a picture and of its maps, and the space between them.
const TILE: i32 = 96;
const GAP: i32 = 8;
const TOP: i32 = 44;

/// The first images of the test part, and for each layer of each run which expert every patch went to first. Colours
/// mean the same expert within a column only.
pub(super) fn routing_maps(path: &Path, runs: &[&Outcome]) -> Result<()> {
    // Titles are measured before there is a picture.
    use_font();
    let step = TILE + GAP;
    let font = (FONT, 14).into_font();
    let mut maps = Vec::new();
    let mut right = GAP + step;
    for run in runs {
        let Some(sample) = &run.sample else { continue };
        let agreement =
            run.routing_agreement.map_or_else(String::new, |a| format!(", neighbours agree {:.0}%", 100.0 * a));
        let title = format!("{}{agreement}", run.variant.name());
        let (title_width, _) = font.box_size(&title).map_err(drawing)?;
        let left = right;
        // Of few layers the title is wider than their maps.
        right += (sample.first_choices.len() as i32 * step).max(title_width as i32 + 2 * GAP);
        maps.push((left, title, sample));
    }
    let Some((.., sample)) = maps.first() else { return Ok(()) };
    let (side, images) = (sample.side as i32, sample.images.len() / (sample.side * sample.side * 3));
    let size = (right, TOP + images as i32 * step);
    png(path, (size.0 as u32, size.1 as u32), |root| {
        for image in 0..images as i32 {
            let pixels = &sample.images[(image * side * side * 3) as usize..][..(side * side * 3) as usize];
            let cells = pixels.chunks_exact(3).map(|p| RGBColor(p[0], p[1], p[2]));
            tile(root, (GAP, TOP + image * step), side, cells)?;
        }
        for (left, title, sample) in &maps {
            root.draw_text(title, &font.color(&BLACK), (*left, 4)).map_err(drawing)?;
            let grid = sample.grid_side as i32;
            for (layer, choices) in sample.first_choices.iter().enumerate() {
                let x = left + layer as i32 * step;
                let name = format!("layer {layer}");
                root.draw_text(&name, &(FONT, 12).into_font().color(&BLACK), (x, 24)).map_err(drawing)?;
                for (image, map) in choices.chunks_exact((grid * grid) as usize).enumerate() {
                    tile(root, (x, TOP + image as i32 * step), grid, map.iter().map(|&e| expert_color(e)))?;
                }
            }
        }
        Ok(())
    })
}

/// Hues a golden angle apart, so that experts of any two numbers look different, in three shades.
fn expert_color(expert: u16) -> RGBColor {
    let hue = (f64::from(expert) * 0.618_033_988_75).fract();
    let lightness = [0.45, 0.62, 0.32][usize::from(expert) % 3];
    let (r, g, b) = HSLColor(hue, 0.75, lightness).rgb();
    RGBColor(r, g, b)
}

/// A `side x side` grid of colours, scaled up to a tile.
fn tile(
    root: &DrawingArea<BitMapBackend<'_>, Shift>,
    (left, top): (i32, i32),
    side: i32,
    cells: impl Iterator<Item = RGBColor>,
) -> Result<()> {
    for (i, color) in (0..).zip(cells) {
        let edge = |n: i32| n * TILE / side;
        let (x, y): (i32, i32) = (i % side, i / side);
        let corners = [(left + edge(x), top + edge(y)), (left + edge(x + 1), top + edge(y + 1))];
        root.draw(&Rectangle::new(corners, color.filled())).map_err(drawing)?;
    }
    Ok(())
}

/// Share of all choices that each expert gets, busiest first, a panel for each run and a line for each layer.
pub(super) fn expert_utilisation(path: &Path, runs: &[&Outcome]) -> Result<()> {
    let runs: Vec<&&Outcome> = runs.iter().filter(|run| run.recipe.feed_forward != FeedForwardKind::Dense).collect();
    if runs.is_empty() {
        return Ok(());
    }
    let busiest = runs.iter().flat_map(|run| run.load.iter().flatten()).copied().fold(0.0, f64::max);
    png(path, (360 * runs.len() as u32, 360), |root| {
        for (panel, run) in root.split_evenly((1, runs.len())).iter().zip(&runs) {
            let experts = run.recipe.model.experts.num_experts as f64;
            let mut chart = ChartBuilder::on(panel)
                .margin(12)
                .caption(run.variant.name(), (FONT, 15))
                .x_label_area_size(34)
                .y_label_area_size(44)
                .build_cartesian_2d(0.0..experts, 0.0..110.0 * busiest)
                .map_err(drawing)?;
            let mut mesh = chart.configure_mesh();
            mesh.max_light_lines(1).x_desc("experts, busiest first").y_desc("% of choices").label_style((FONT, 11));
            mesh.x_label_formatter(&|x| format!("{x:.0}")).y_label_formatter(&|y| format!("{y:.0}"));
            mesh.x_labels(5).y_labels(6).draw().map_err(drawing)?;
            let even = 100.0 / experts;
            let level = LineSeries::new([(0.0, even), (experts, even)], BLACK.mix(0.4));
            chart
                .draw_series(level)
                .map_err(drawing)?
                .label("even")
                .legend(|(x, y)| PathElement::new([(x, y), (x + 14, y)], BLACK.mix(0.4)));
            for (layer, load) in run.load.iter().enumerate() {
                let mut load = load.clone();
                load.sort_by(|a, b| b.total_cmp(a));
                let color = color(layer);
                let points = (0..).zip(load).map(|(rank, share)| (f64::from(rank), 100.0 * share));
                let line = LineSeries::new(points, color.stroke_width(2));
                let key = move |(x, y)| PathElement::new([(x, y), (x + 14, y)], color.stroke_width(2));
                chart.draw_series(line).map_err(drawing)?.label(format!("layer {layer}")).legend(key);
            }
            let mut labels = chart.configure_series_labels();
            labels.background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.4)).label_font((FONT, 11));
            labels.draw().map_err(drawing)?;
        }
        Ok(())
    })
}
