//! Choosing experts (`golden/reference.py: route`).

/// The `top_k` largest of `logits`, largest first, ties to the lower index, with softmax over the chosen ones.
/// Writes `ids` and `weights`, both `[top_k]` with `top_k <= logits.len()`.
pub fn top_k(logits: &[f32], ids: &mut [u16], weights: &mut [f32]) {
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
