//! Choosing experts (`golden/reference.py: route`).

use super::isa::Isa;
use super::simd::{Simd, Work, dispatch};

/// The `top_k` largest of `logits`, largest first, ties to the lower index, with softmax over the chosen ones: the
/// definition. Writes `ids` and `weights`, both `[top_k]` with `top_k <= logits.len()`.
pub fn top_k(logits: &[f32], ids: &mut [u16], weights: &mut [f32]) {
    sorted(logits, ids, weights);
    softmax(weights);
}

/// [`top_k`] of numbers, to the last bit.
pub fn choose(isa: Isa, logits: &[f32], ids: &mut [u16], weights: &mut [f32]) {
    if !dispatch(isa, Largest { logits, ids, weights }) {
        sorted(logits, ids, weights);
    }
    softmax(weights);
}

fn softmax(weights: &mut [f32]) {
    let max = weights[0];
    let mut sum = 0.0;
    for w in weights.iter_mut() {
        *w = (*w - max).exp();
        sum += *w;
    }
    for w in weights.iter_mut() {
        *w /= sum;
    }
}

/// The largest logits by one search each, without a branch that depends on them.
struct Largest<'a> {
    logits: &'a [f32],
    ids: &'a mut [u16],
    weights: &'a mut [f32],
}

/// Most logits, and most of them chosen, for which searches are worth it.
const SEARCHED: (usize, usize) = (64, 2);

impl Work for Largest<'_> {
    /// Whether it was done: only whole registers of finite logits are.
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> bool {
        let Self { logits, ids, weights } = self;
        let (most, most_chosen) = SEARCHED;
        if logits.len() > most || ids.len() > most_chosen || !logits.len().is_multiple_of(S::LANES) {
            return false;
        }
        let mut left = [f32::NEG_INFINITY; SEARCHED.0];
        let left = &mut left[..logits.len()];
        left.copy_from_slice(logits);
        for (id, weight) in ids.iter_mut().zip(weights) {
            let mut max = simd.splat(f32::NEG_INFINITY);
            for logits in left.chunks_exact(S::LANES) {
                max = simd.max(max, simd.load(logits));
            }
            let max = simd.max_lane(max);
            let Some(at) = left.iter().position(|&logit| logit == max).filter(|_| max.is_finite()) else {
                return false;
            };
            (*id, *weight) = (at as u16, max);
            left[at] = f32::NEG_INFINITY;
        }
        true
    }
}

/// The largest logits and their indices, largest first.
fn sorted(logits: &[f32], ids: &mut [u16], weights: &mut [f32]) {
    let k = ids.len();
    let mut filled = 0;
    for (i, &logit) in logits.iter().enumerate() {
        // Most logits do not belong among the best so far.
        if filled == k && logit <= weights[k - 1] {
            continue;
        }
        // Insertion into a short sorted list; strict comparison keeps the lower index first among ties.
        let mut at = filled;
        while at > 0 && logit > weights[at - 1] {
            at -= 1;
        }
        if at < k {
            filled = (filled + 1).min(k);
            weights[at..filled].rotate_right(1);
            ids[at..filled].rotate_right(1);
            weights[at] = logit;
            ids[at] = i as u16;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Few values, so that many are equal; now and then not all are finite.
        #[test]
        fn every_isa_chooses_what_sorting_does(
            logits in prop::collection::vec(-6i8..6, 1..70), whole: bool, odd in prop::sample::select(vec![0.5, f32::NEG_INFINITY, f32::INFINITY]),
        ) {
            let value = |&logit: &i8| if logit == 5 { odd } else { f32::from(logit) };
            let mut logits: Vec<f32> = logits.iter().map(value).collect();
            if whole {
                logits.resize(logits.len().next_multiple_of(16), -3.0);
            }
            for k in 1..=logits.len().min(3) {
                let (mut ids, mut weights) = (vec![0; k], vec![0.0; k]);
                sorted(&logits, &mut ids, &mut weights);
                for isa in Isa::available() {
                    let (mut got, mut largest) = (vec![9; k], vec![0.0; k]);
                    if dispatch(isa, Largest { logits: &logits, ids: &mut got, weights: &mut largest }) {
                        prop_assert_eq!((&got, &largest), (&ids, &weights), "{}: {:?}", isa, logits);
                    }
                }
            }
        }
    }
}
