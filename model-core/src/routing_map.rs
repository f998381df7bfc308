//! How alike pairs of patches are routed: the one definition of agreement, for the map of an image that the server draws
//! and for the tables of a data set that the trainer prints.
//!
//! ButterflyViT trains its routers for spatial smoothness: patches that lie side by side should choose the same experts.
//! Two figures say how well that went. [`Pairs::agreement`] is the share of chosen experts that the patches of a pair have
//! in common, whatever their order; [`Pairs::same_first_choice`] is the share of pairs whose first choice is the same.
//! Both mean something only beside what patches reach that are no neighbours.

/// Pairs of patches, and how they were routed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pairs {
    pub count: u64,
    /// Experts that both patches of a pair chose, over all pairs.
    pub shared: u64,
    /// Pairs whose first choice is the same.
    pub same_first: u64,
}

impl Pairs {
    /// The pairs of patches that lie `distance` apart, across or down, in a square grid routed to `experts`
    /// `[side, side, top_k]`, best first. Neighbours have distance 1.
    pub fn apart(distance: usize, experts: &[u16], side: usize, top_k: usize) -> Self {
        let mut pairs = Self::default();
        let chosen = |y: usize, x: usize| &experts[(y * side + x) * top_k..][..top_k];
        for (y, x) in (0..side).flat_map(|y| (0..side).map(move |x| (y, x))) {
            for (other_y, other_x) in [(y + distance, x), (y, x + distance)] {
                if other_y < side && other_x < side {
                    let (a, b) = (chosen(y, x), chosen(other_y, other_x));
                    pairs.count += 1;
                    pairs.shared += a.iter().filter(|expert| b.contains(expert)).count() as u64;
                    pairs.same_first += u64::from(a[0] == b[0]);
                }
            }
        }
        pairs
    }

    /// All pairs of patches, near or far, by their first choices among `num_experts`: what neighbours reach by chance.
    /// Ordered pairs, without what they share beyond the first choice.
    pub fn any(experts: &[u16], num_experts: usize, top_k: usize) -> Self {
        let mut counts = vec![0u64; num_experts];
        experts.iter().step_by(top_k).for_each(|&first| counts[usize::from(first)] += 1);
        let same_first = counts.iter().map(|&count| count * count.saturating_sub(1)).sum();
        let patches: u64 = counts.iter().sum();
        Self { count: patches * patches.saturating_sub(1), shared: same_first, same_first }
    }

    /// Share of chosen experts that the patches of a pair have in common; none without pairs.
    pub fn agreement(&self, top_k: usize) -> Option<f64> {
        (self.count > 0).then(|| self.shared as f64 / (self.count * top_k as u64) as f64)
    }

    /// Share of pairs whose first choice is the same; none without pairs.
    pub fn same_first_choice(&self) -> Option<f64> {
        (self.count > 0).then(|| self.same_first as f64 / self.count as f64)
    }
}

impl std::ops::AddAssign for Pairs {
    fn add_assign(&mut self, other: Self) {
        self.count += other.count;
        self.shared += other.shared;
        self.same_first += other.same_first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_counted_across_and_down() {
        // 0 0 1
        // 0 2 1     twelve pairs touch, five agree: 0-0 across, 0-0 down twice, 1-1 down, 2-2 down
        // 0 2 3
        let first = [0, 0, 1, 0, 2, 1, 0, 2, 3];
        assert_eq!(Pairs::apart(1, &first, 3, 1), Pairs { count: 12, shared: 5, same_first: 5 });
        // Ordered pairs of four 0s, two 1s, two 2s and one 3: 12 + 2 + 2 of 72.
        assert_eq!(Pairs::any(&first, 4, 1), Pairs { count: 72, shared: 16, same_first: 16 });
    }

    #[test]
    fn shared_experts_count_whatever_their_order() {
        // A 2x2 grid, top-2: rows share both experts in another order, columns share one.
        let pairs = Pairs::apart(1, &[0, 1, 1, 0, 1, 2, 2, 1], 2, 2);
        assert_eq!(pairs, Pairs { count: 4, shared: 6, same_first: 0 });
        assert_eq!((pairs.agreement(2), pairs.same_first_choice()), (Some(0.75), Some(0.0)));
    }

    #[test]
    fn distance_tells_stripes_from_neighbours() {
        // Stripes of one column in a 4x4 grid: patches two rows or two columns apart agree.
        let stripes = [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1];
        assert_eq!(Pairs::apart(2, &stripes, 4, 1), Pairs { count: 16, shared: 16, same_first: 16 });
        assert_eq!(Pairs::apart(1, &stripes, 4, 1).agreement(1), Some(0.5));
    }

    #[test]
    fn a_single_patch_has_no_pair() {
        let none = Pairs::apart(1, &[3], 1, 1);
        assert_eq!((none.agreement(1), none.same_first_choice()), (None, None));
        assert_eq!(Pairs::any(&[3], 4, 1).same_first_choice(), None);
    }
}
