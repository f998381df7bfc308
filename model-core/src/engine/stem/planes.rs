//! Where the outputs of layers lie in one buffer, so that those which are not needed at a time share their bytes.

use std::ops::Range;

/// Planes begin at multiples of this.
const ALIGNMENT: usize = 64;

/// A plane that is written before layer `from` runs, and read last by layer `to`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lifetime {
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) len: usize,
}

/// A place for every plane, none of which overlaps another while both are alive. First fit, in the order given.
pub(super) fn places(planes: &[Lifetime]) -> Vec<Range<usize>> {
    let mut placed: Vec<(Lifetime, Range<usize>)> = Vec::with_capacity(planes.len());
    for &plane in planes {
        let mut taken: Vec<Range<usize>> = placed
            .iter()
            // The output of a layer is written while its input is read.
            .filter(|(other, _)| other.to + 1 >= plane.from && plane.to + 1 >= other.from)
            .map(|(_, place)| place.clone())
            .collect();
        taken.sort_unstable_by_key(|place| place.start);
        let mut start = 0;
        for place in taken {
            if start + plane.len <= place.start {
                break;
            }
            start = start.max(place.end.next_multiple_of(ALIGNMENT));
        }
        placed.push((plane, start..start + plane.len));
    }
    placed.into_iter().map(|(_, place)| place).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn planes_that_live_together_do_not_overlap(
            planes in prop::collection::vec((0usize..6, 1usize..300), 1..20),
        ) {
            let planes: Vec<_> = planes.into_iter().enumerate()
                .map(|(i, (longer, len))| Lifetime { from: i, to: i + longer, len }).collect();
            let places = places(&planes);
            for (i, (a, at)) in planes.iter().zip(&places).enumerate() {
                prop_assert_eq!(at.len(), a.len);
                for (b, other) in planes.iter().zip(&places).take(i) {
                    let together = b.to + 1 >= a.from;
                    prop_assert!(!together || at.end <= other.start || other.end <= at.start);
                }
            }
        }
    }

    #[test]
    fn a_chain_needs_its_two_largest_neighbours() {
        let chain: Vec<_> =
            [64, 640, 128, 64].into_iter().enumerate().map(|(i, len)| Lifetime { from: i, to: i, len }).collect();
        let end = places(&chain).iter().map(|place| place.end).max();
        assert_eq!(end, Some(64 + 640 + 128));
    }
}
