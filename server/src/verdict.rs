//! Whether a picture is unknown to the expert set that was asked, and why.

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Whether a picture is unknown, and why.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Verdict {
    /// Whether the picture is none that the set knows; null when the set has no statistics to tell, and neither the
    /// picture nor `min_score` decides.
    #[schema(required = true)]
    pub unknown: Option<bool>,
    /// Why it is unknown.
    #[serde(rename = "unknown_reason", skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
}

/// Why a picture is unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Reason {
    /// It shows nothing: black, white, one colour, a lens cap.
    Flat,
    /// It is unlike what the set was fitted to.
    Unfamiliar,
    /// The best label's score is below `min_score`.
    Unsure,
}

impl Reason {
    pub const ALL: [Self; 3] = [Self::Flat, Self::Unfamiliar, Self::Unsure];

    /// In answers, and as a metric label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Flat => "flat",
            Self::Unfamiliar => "unfamiliar",
            Self::Unsure => "unsure",
        }
    }
}

/// What is known of a picture before it is decided.
#[derive(Debug, Clone, Copy)]
pub struct Evidence {
    pub is_flat: bool,
    /// By the set's statistics, if it has any.
    pub is_familiar: Option<bool>,
    /// Softmax score of the best label.
    pub best_score: f32,
}

impl Evidence {
    /// The picture itself decides first, then the set's statistics, then the score that the request asks for.
    pub fn decide(self, min_score: Option<MinScore>) -> Verdict {
        let is_unsure = min_score.is_some_and(|MinScore(least)| self.best_score < least);
        let reason = match self {
            Self { is_flat: true, .. } => Some(Reason::Flat),
            Self { is_familiar: Some(false), .. } => Some(Reason::Unfamiliar),
            _ if is_unsure => Some(Reason::Unsure),
            _ => None,
        };
        // Familiarity is all that can tell that a picture is known.
        let unknown = if reason.is_some() { Some(true) } else { self.is_familiar.map(|familiar| !familiar) };
        Verdict { unknown, reason }
    }
}

/// The least softmax score of a best label that is sure, from 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(try_from = "f32")]
pub struct MinScore(f32);

/// It is no number from 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("min_score is a number from 0 to 1")]
pub struct MinScoreError;

impl TryFrom<f32> for MinScore {
    type Error = MinScoreError;

    fn try_from(score: f32) -> Result<Self, MinScoreError> {
        if (0.0..=1.0).contains(&score) { Ok(Self(score)) } else { Err(MinScoreError) }
    }
}

impl FromStr for MinScore {
    type Err = MinScoreError;

    fn from_str(text: &str) -> Result<Self, MinScoreError> {
        text.trim().parse::<f32>().map_err(|_| MinScoreError)?.try_into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_picture_decides_before_the_statistics_and_those_before_the_score() {
        let decide = |is_flat, is_familiar, best_score, min_score: Option<&str>| {
            let min_score = min_score.map(|text| text.parse().unwrap());
            let Verdict { unknown, reason } = Evidence { is_flat, is_familiar, best_score }.decide(min_score);
            (unknown, reason.map(Reason::as_str))
        };
        assert_eq!(decide(true, Some(false), 0.1, Some("0.5")), (Some(true), Some("flat")));
        assert_eq!(decide(true, None, 1.0, None), (Some(true), Some("flat")));
        assert_eq!(decide(false, Some(false), 0.1, Some("0.5")), (Some(true), Some("unfamiliar")));
        assert_eq!(decide(false, Some(true), 0.1, Some("0.5")), (Some(true), Some("unsure")));
        assert_eq!(decide(false, None, 0.1, Some("0.5")), (Some(true), Some("unsure")));
        assert_eq!(decide(false, Some(true), 0.5, Some("0.5")), (Some(false), None));
        assert_eq!(decide(false, None, 0.9, Some("0.5")), (None, None));
        assert_eq!(decide(false, None, 0.1, None), (None, None));
    }

    #[test]
    fn scores_are_from_0_to_1() {
        for text in ["0", "1", "0.5", " 1e-3 "] {
            assert!(text.parse::<MinScore>().is_ok(), "{text}");
        }
        for text in ["", "-0.1", "1.01", "nan", "inf", "50%", "0,5"] {
            assert_eq!(text.parse::<MinScore>(), Err(MinScoreError), "{text}");
        }
        assert!(serde_json::from_str::<MinScore>("0.5").is_ok() && serde_json::from_str::<MinScore>("2").is_err());
    }
}
