//! Routing maps: which experts each patch of an image went to, and how alike neighbours are.
//!
//! `neighbour_agreement` says how often neighbours share their first choice; `chance_agreement` says what the same choices
//! would reach if they were strewn over the image at random, so that a layer in which one expert takes everything does not
//! look smooth. Both are [`Pairs::same_first_choice`].

use model_core::routing_map::Pairs;
use serde::Serialize;
use utoipa::ToSchema;

/// Which experts each patch of an image went to, in every layer.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct RoutingMap {
    /// Patches down and across.
    pub grid: [usize; 2],
    /// Experts to choose from, in every layer.
    pub num_experts: usize,
    /// Experts chosen for each patch.
    pub top_k: usize,
    /// One for each transformer block, first to last.
    pub layers: Vec<LayerRouting>,
}

/// One layer of a [`RoutingMap`].
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct LayerRouting {
    /// For each patch, row by row from the top left: the chosen experts, heaviest first.
    pub experts: Vec<Vec<u16>>,
    /// Share of the pairs of patches side by side or one above the other whose first choice is the same; null when the
    /// grid has one patch.
    pub neighbour_agreement: Option<f64>,
    /// The same share among all pairs of patches, near or far: what the pairs above would reach by chance.
    pub chance_agreement: Option<f64>,
}

impl LayerRouting {
    /// Bytes that it takes in JSON at most.
    pub fn json_bytes(&self) -> usize {
        // Expert numbers have up to five digits, each with a comma; the rest is names and two fractions.
        self.experts.iter().map(|chosen| 3 + 6 * chosen.len()).sum::<usize>() + 160
    }
}

impl RoutingMap {
    /// The map of a square grid from the chosen experts `[layers, grid_side * grid_side, top_k]`.
    pub fn new(chosen: &[u16], grid_side: usize, num_experts: usize, top_k: usize) -> Self {
        let layer = |chosen: &[u16]| LayerRouting {
            experts: chosen.chunks(top_k).map(<[u16]>::to_vec).collect(),
            neighbour_agreement: Pairs::apart(1, chosen, grid_side, top_k).same_first_choice(),
            chance_agreement: Pairs::any(chosen, num_experts, top_k).same_first_choice(),
        };
        let layers = chosen.chunks(grid_side * grid_side * top_k).map(layer).collect();
        Self { grid: [grid_side; 2], num_experts, top_k, layers }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agreement_counts_pairs_that_touch() {
        // 0 0 1
        // 0 2 1     twelve pairs touch, five agree: 0-0 across, 0-0 down twice, 1-1 down, 2-2 down
        // 0 2 3
        let first = [0, 0, 1, 0, 2, 1, 0, 2, 3];
        let chosen: Vec<u16> = first.iter().flat_map(|&expert| [expert, 7]).collect();
        let map = RoutingMap::new(&chosen, 3, 8, 2);
        assert_eq!((map.grid, map.layers.len()), ([3, 3], 1));
        assert_eq!(map.layers[0].experts[4], [2, 7]);
        assert_eq!(map.layers[0].neighbour_agreement, Some(5.0 / 12.0));
        // Ordered pairs of four 0s, two 1s, two 2s and one 3: 12 + 2 + 2 of 72.
        assert_eq!(map.layers[0].chance_agreement, Some(16.0 / 72.0));
    }

    #[test]
    fn one_expert_for_everything_agrees_as_much_as_chance() {
        let map = RoutingMap::new(&[5; 32], 4, 6, 1);
        assert_eq!(map.layers.len(), 2);
        for layer in map.layers {
            assert_eq!((layer.neighbour_agreement, layer.chance_agreement), (Some(1.0), Some(1.0)));
        }
    }

    #[test]
    fn a_checkerboard_never_agrees_and_a_single_patch_has_no_neighbour() {
        let checkerboard: Vec<u16> = (0..16).map(|i| (i / 4 + i % 4) % 2).collect();
        assert_eq!(RoutingMap::new(&checkerboard, 4, 2, 1).layers[0].neighbour_agreement, Some(0.0));
        let single = RoutingMap::new(&[3], 1, 4, 1);
        assert_eq!(single.layers[0].neighbour_agreement, None);
        assert_eq!(single.layers[0].chance_agreement, None);
    }
}
