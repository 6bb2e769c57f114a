//! Loss against seconds, drawn.

use super::chains::{CHAINS, DESCENT, GPTQ};
use super::report::Summary;
use aespa_gpu::{Error, Result};

/// Loss over GPTQ's against seconds, a series per width; lines join what nothing faster beats. Nearest rounding is far above the rest
/// and left out.
pub fn picture(title: &str, summaries: &[Summary]) -> Result<String> {
    let mut svg = String::new();
    draw(&mut svg, title, summaries).map_err(|e| Error::internal("picture", e))?;
    Ok(svg)
}

/// What the labels mean.
const KEY: &str = "A: AdaRound, published; N: normalised; with their iterations; B: in blocks. x 8: column orders. D: descent (greedy: no annealing; fixed: scales stay).";

fn draw(svg: &mut String, title: &str, summaries: &[Summary]) -> std::result::Result<(), String> {
    use plotters::prelude::*;
    const COLOURS: [RGBColor; 4] = [RGBColor(193, 39, 45), RGBColor(0, 99, 178), RGBColor(20, 130, 60), RGBColor(110, 60, 150)];
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let drawn: Vec<usize> = (GPTQ..CHAINS.len()).filter(|i| summaries.iter().all(|s| s.loss[*i].is_finite())).collect();
    let points: Vec<Vec<(f64, f64)>> =
        summaries.iter().map(|s| drawn.iter().map(|i| (s.seconds[*i].max(1e-6), s.relative(*i))).collect()).collect();
    let bounds = |of: fn(&(f64, f64)) -> f64| {
        let values = || points.iter().flatten().map(of);
        (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max))
    };
    let ((x0, x1), (y0, y1)) = (bounds(|p| p.0), bounds(|p| p.1));
    let root = SVGBackend::with_string(svg, (900, 600)).into_drawing_area();
    root.fill(&WHITE).map_err(|e| text(&e))?;
    root.draw(&Text::new(KEY, (76, 40), ("sans-serif", 12))).map_err(|e| text(&e))?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .margin_top(8)
        .x_label_area_size(42)
        .y_label_area_size(56)
        .build_cartesian_2d((x0 / 1.5..x1 * 2.5).log_scale(), y0 - 0.02..y1 + 0.05)
        .map_err(|e| text(&e))?;
    chart
        .configure_mesh()
        .x_desc("seconds of rounding, all linears")
        .y_desc("loss over GPTQ's")
        .x_label_formatter(&|x| format!("{x}"))
        .y_label_formatter(&|y| format!("{y:.2}"))
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .draw()
        .map_err(|e| text(&e))?;
    for ((summary, points), colour) in summaries.iter().zip(&points).zip(COLOURS.iter().cycle()) {
        let mut front: Vec<(f64, f64)> = points.iter().copied().filter(|p| points.iter().all(|o| o.0 >= p.0 || o.1 > p.1)).collect();
        front.sort_by(|a, b| a.0.total_cmp(&b.0));
        chart.draw_series(LineSeries::new(front, colour.mix(0.5).stroke_width(2))).map_err(|e| text(&e))?;
        let marks = PointSeries::of_element(points.iter().copied(), 4, colour.filled(), &|at, size, style| Circle::new(at, size, style));
        let legend = move |(x, y)| Circle::new((x + 8, y), 4, colour.filled());
        chart.draw_series(marks).map_err(|e| text(&e))?.label(format!("{} bits", summary.bits)).legend(legend);
        // The default stands below its point: other descents are near.
        let label = |(i, at): (usize, &(f64, f64))| {
            let offset = if drawn[i] == DESCENT { (-3, 6) } else { (6, -12) };
            EmptyElement::at(*at) + Text::new(CHAINS[drawn[i]].label, offset, ("sans-serif", 12).into_font().color(colour))
        };
        // GPTQ's losses are all 1, and one label serves all.
        let skip = usize::from(summary.bits != summaries[0].bits);
        chart.draw_series(points.iter().enumerate().skip(skip).map(label)).map_err(|e| text(&e))?;
    }
    let mut legend = chart.configure_series_labels();
    legend.position(SeriesLabelPosition::UpperRight).border_style(BLACK.mix(0.3)).label_font(("sans-serif", 13));
    legend.draw().map_err(|e| text(&e))?;
    drop(chart);
    root.present().map_err(|e| text(&e))
}
