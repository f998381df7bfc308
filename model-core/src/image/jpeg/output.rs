//! Samples of components to RGB: enlarging as libjpeg does by default ("fancy"), then BT.601.

use ::image::RgbImage;

use super::super::error::ImageError;
use super::frame::{Frame, Header};
use super::scan::Plane;
use crate::kernels::vectorized;

/// Pixels across and down at 1/`reduction` of the scale.
pub(super) fn size(frame: &Frame, reduction: u32) -> (u32, u32) {
    (frame.width.div_ceil(reduction), frame.height.div_ceil(reduction))
}

/// Of the rows in flight: one of each component, and two that are enlarged in both directions.
pub(super) fn row_bytes(width: u32) -> u64 {
    // Enlarged rows may reach past the image by less than a block.
    (3 + 2) * 2 * (u64::from(width) + 32)
}

/// The image of all components.
pub(super) fn rgb(
    planes: &[Plane],
    header: &Header,
    reduction: u32,
    stopped: &dyn Fn() -> bool,
) -> Result<RgbImage, ImageError> {
    let (width, height) = size(&header.frame, reduction);
    // Where a block is a single sample there is nothing to smooth.
    let smooth = reduction < 8;
    let mut rows: Vec<Vec<u8>> = planes.iter().map(|_| Vec::new()).collect();
    let mut out = vec![0; 3 * width as usize * height as usize];
    for (y, out) in out.chunks_exact_mut(3 * width as usize).enumerate() {
        if stopped() {
            return Err(ImageError::Stopped);
        }
        for (row, plane) in rows.iter_mut().zip(planes) {
            vectorized(
                #[inline(always)]
                || enlarge(plane, y, smooth, row),
            );
        }
        match rows.as_slice() {
            [grey] => out.chunks_exact_mut(3).zip(grey).for_each(|(pixel, &sample)| pixel.fill(sample)),
            [y, cb, cr] if header.ycc => vectorized(
                #[inline(always)]
                || {
                    for (pixel, ((&y, &cb), &cr)) in out.as_chunks_mut().0.iter_mut().zip(y.iter().zip(cb).zip(cr)) {
                        *pixel = from_ycc(y, cb, cr);
                    }
                },
            ),
            [red, green, blue] => {
                for (pixel, ((&r, &g), &b)) in out.as_chunks_mut().0.iter_mut().zip(red.iter().zip(green).zip(blue)) {
                    *pixel = [r, g, b];
                }
            }
            _ => unreachable!("a frame has one or three components"),
        }
    }
    Ok(RgbImage::from_raw(width, height, out).expect("three samples a pixel"))
}

/// BT.601 in 16 fractional bits.
#[inline(always)]
fn from_ycc(y: u8, cb: u8, cr: u8) -> [u8; 3] {
    const fn fix(value: f64) -> i32 {
        (value * 65536.0 + 0.5) as i32
    }
    const HALF: i32 = 1 << 15;
    let (y, cb, cr) = (i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128);
    let r = y + ((fix(1.402) * cr + HALF) >> 16);
    let g = y + ((-fix(0.344_14) * cb - fix(0.714_14) * cr + HALF) >> 16);
    let b = y + ((fix(1.772) * cb + HALF) >> 16);
    [r, g, b].map(|sample| sample.clamp(0, 255) as u8)
}

/// Row `y` of the image, of one component.
#[inline(always)]
fn enlarge(plane: &Plane, y: usize, smooth: bool, out: &mut Vec<u8>) {
    let row = |y: usize| &plane.samples[y * plane.stride..][..plane.width];
    let (nearest, width) = (row(y / plane.v_expand), plane.width);
    // The row beyond the nearest on the side of this one, which weighs a quarter.
    let beyond =
        || row(if y.is_multiple_of(2) { (y / 2).saturating_sub(1) } else { (y / 2 + 1).min(plane.height - 1) });
    out.resize(width * plane.h_expand, 0);
    match (plane.h_expand, plane.v_expand) {
        (1, 1) => out.copy_from_slice(nearest),
        (2, 1) if smooth && width > 2 => {
            let value = |x: usize| u16::from(nearest[x]);
            for (x, pair) in out.as_chunks_mut().0.iter_mut().enumerate() {
                let (left, right) = (value(x.saturating_sub(1)), value((x + 1).min(width - 1)));
                *pair = [(3 * value(x) + left + 1) >> 2, (3 * value(x) + right + 2) >> 2].map(|sample| sample as u8);
            }
        }
        (1, 2) if smooth => {
            // Rounded up and down by turns.
            let half = if y.is_multiple_of(2) { 1 } else { 2 };
            for ((out, &near), &far) in out.iter_mut().zip(nearest).zip(beyond()) {
                *out = ((3 * u16::from(near) + u16::from(far) + half) >> 2) as u8;
            }
        }
        (2, 2) if smooth && width > 2 => {
            let beyond = beyond();
            let sum = |x: usize| 3 * u16::from(nearest[x]) + u16::from(beyond[x]);
            for (x, pair) in out.as_chunks_mut().0.iter_mut().enumerate() {
                let (left, right) = (sum(x.saturating_sub(1)), sum((x + 1).min(width - 1)));
                *pair = [(3 * sum(x) + left + 8) >> 4, (3 * sum(x) + right + 7) >> 4].map(|sample| sample as u8);
            }
        }
        (h_expand, _) => {
            out.chunks_exact_mut(h_expand).zip(nearest).for_each(|(samples, &sample)| samples.fill(sample));
        }
    }
}
