//! Sums of rows: the weighted sum over a token's experts, and residual additions.

use super::isa::Isa;
use super::simd::{Simd, Work, dispatch};

/// `out = sum over k of weights[k] * rows[ids[k]]`, summed in the order of `ids`; `rows` is `[_, out.len()]`.
///
/// # Panics
/// When `ids` and `weights` differ in length or an id has no row.
pub fn weighted_sum(isa: Isa, rows: &[f32], ids: &[u32], weights: &[f32], out: &mut [f32]) {
    assert_eq!(ids.len(), weights.len(), "one weight per row");
    let n = out.len();
    assert!(ids.iter().all(|&id| (id as usize + 1) * n <= rows.len()), "a row beyond the matrix");
    dispatch(isa, WeightedSum { rows, ids, weights, out });
}

struct WeightedSum<'a> {
    rows: &'a [f32],
    ids: &'a [u32],
    weights: &'a [f32],
    out: &'a mut [f32],
}

impl Work for WeightedSum<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let n = self.out.len();
        let body = n / S::LANES * S::LANES;
        let row = |id: u32| &self.rows[id as usize * n..][..n];
        if let (&[first, second], &[w1, w2]) = (self.ids, self.weights) {
            let (first, second) = (row(first), row(second));
            let (w1, w2, zero) = (simd.splat(w1), simd.splat(w2), simd.splat(0.0));
            for i in (0..body).step_by(S::LANES) {
                let sum = simd.mul_add(w1, simd.load(&first[i..]), zero);
                simd.store(&mut self.out[i..], simd.mul_add(w2, simd.load(&second[i..]), sum));
            }
        } else {
            for i in (0..body).step_by(S::LANES) {
                let mut sum = simd.splat(0.0);
                for (&id, &weight) in self.ids.iter().zip(self.weights) {
                    sum = simd.mul_add(simd.splat(weight), simd.load(&row(id)[i..]), sum);
                }
                simd.store(&mut self.out[i..], sum);
            }
        }
        for i in body..n {
            self.out[i] = self.ids.iter().zip(self.weights).map(|(&id, &weight)| weight * row(id)[i]).sum();
        }
    }
}

/// `out += x`.
///
/// # Panics
/// When the lengths differ.
pub fn add_assign(isa: Isa, out: &mut [f32], x: &[f32]) {
    assert_eq!(out.len(), x.len(), "both sides of a sum");
    dispatch(isa, AddAssign { out, x });
}

struct AddAssign<'a> {
    out: &'a mut [f32],
    x: &'a [f32],
}

impl Work for AddAssign<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let body = self.x.len() / S::LANES * S::LANES;
        for i in (0..body).step_by(S::LANES) {
            let sum = simd.add(simd.load(&self.out[i..]), simd.load(&self.x[i..]));
            simd.store(&mut self.out[i..], sum);
        }
        for (out, x) in self.out[body..].iter_mut().zip(&self.x[body..]) {
            *out += x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_any_length_equal_the_definition() {
        for isa in Isa::available() {
            for n in 0..40 {
                let rows: Vec<f32> = (0..3 * n).map(|i| i as f32).collect();
                let mut out = vec![0.0; n];
                weighted_sum(isa, &rows, &[2, 0], &[0.5, 2.0], &mut out);
                let expected: Vec<f32> = (0..n).map(|i| 0.5 * (2 * n + i) as f32 + 2.0 * i as f32).collect();
                assert_eq!(out, expected, "{isa}, {n}");
                let mut all = vec![0.0; n];
                weighted_sum(isa, &rows, &[2, 0, 1], &[0.5, 2.0, 1.0], &mut all);
                let third = |(i, v): (usize, &f32)| v + (n + i) as f32;
                assert!(all.into_iter().eq(expected.iter().enumerate().map(third)), "{isa}, {n}");
                add_assign(isa, &mut out, &rows[..n]);
                assert!(out.iter().zip(&expected).enumerate().all(|(i, (a, b))| *a == b + i as f32), "{isa}, {n}");
            }
        }
    }
}
