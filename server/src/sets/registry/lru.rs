//! The order of eviction: a segmented LRU. A set enters on probation; a second use while resident makes it hot; victims
//! come from probation first. One sweep over hundreds of sets therefore churns probation and leaves the hot ones be.
//!
//! The hot segment is kept below [`HOT_SHARE`] of the bytes there are for sets by demoting its oldest members, so that it cannot
//! freeze out newcomers for ever.

/// Largest share of the bytes for sets that may be hot, in percent.
const HOT_SHARE: usize = 80;

/// Use of one resident set; all the order there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Usage {
    /// Tick of the last use; larger is later.
    pub last: u64,
    /// Used at least twice while resident, and not demoted since.
    pub hot: bool,
}

impl Usage {
    /// A set that has just become resident.
    pub(super) const fn first(tick: u64) -> Self {
        Self { last: tick, hot: false }
    }

    pub(super) const fn touch(&mut self, tick: u64) {
        *self = Self { last: tick, hot: true };
    }

    /// Ascending = evicted earlier.
    pub(super) const fn order(&self) -> (bool, u64) {
        (self.hot, self.last)
    }
}

/// Demotes the oldest hot members until the hot ones fit their share of `capacity` bytes.
pub(super) fn demote_excess<'a>(members: impl Iterator<Item = (&'a mut Usage, usize)>, capacity: usize) {
    let mut hot_bytes = 0;
    let mut hot: Vec<(&mut Usage, usize)> = Vec::new();
    for (usage, bytes) in members {
        if usage.hot {
            hot_bytes += bytes;
            hot.push((usage, bytes));
        }
    }
    hot.sort_by_key(|(usage, _)| usage.last);
    // The newest stays hot even when it alone is over the share.
    let demotable = hot.len().saturating_sub(1);
    for (usage, bytes) in hot.into_iter().take(demotable) {
        if hot_bytes <= capacity / 100 * HOT_SHARE {
            break;
        }
        usage.hot = false;
        hot_bytes -= bytes;
    }
}

/// The first of `candidates`, in eviction order, that together free at least `needed` bytes; `None` when all of them
/// do not: evicting some would then cost reloads and gain nothing.
pub(super) fn plan_eviction<K, O: Ord>(needed: usize, mut candidates: Vec<(K, O, usize)>) -> Option<Vec<K>> {
    candidates.sort_by(|(_, a, _), (_, b, _)| a.cmp(b));
    let mut freed = 0usize;
    let mut victims = Vec::new();
    for (key, _, bytes) in candidates {
        if freed >= needed {
            break;
        }
        freed = freed.saturating_add(bytes);
        victims.push(key);
    }
    (freed >= needed).then_some(victims)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probation_goes_before_hot_and_old_before_new() {
        let mut hot_old = Usage::first(1);
        hot_old.touch(2);
        let candidates = vec![("hot", hot_old.order(), 10), ("new", (false, 9), 10), ("old", (false, 3), 10)];
        assert_eq!(plan_eviction(0, candidates.clone()), Some(vec![]));
        assert_eq!(plan_eviction(10, candidates.clone()), Some(vec!["old"]));
        assert_eq!(plan_eviction(25, candidates.clone()), Some(vec!["old", "new", "hot"]));
        assert_eq!(plan_eviction(31, candidates), None);
    }

    #[test]
    fn the_hot_segment_leaves_room_for_newcomers() {
        let mut usages: Vec<Usage> = (0..10).map(|tick| Usage { last: tick, hot: true }).collect();
        demote_excess(usages.iter_mut().map(|usage| (usage, 10)), 100);
        let hot: Vec<u64> = usages.iter().filter(|usage| usage.hot).map(|usage| usage.last).collect();
        assert_eq!(hot, (2..10).collect::<Vec<_>>());
    }
}
