//! What a camera's answers come to: no clock, no network.

use std::collections::VecDeque;

use serde::Serialize;
use utoipa::ToSchema;

use super::file::Agree;

/// Failed attempts in a row after which a camera is silent.
const SILENT_AFTER: u32 = 3;

/// How a camera is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Condition {
    /// There has been no frame yet.
    Starting,
    Ok,
    /// Its frames show nothing: black, one colour, a lens cap.
    Dark,
    /// Its frames have not changed at all for long.
    Frozen,
    /// It sends no pictures: three attempts in a row have failed.
    Silent,
    /// The file says `enabled = false`.
    Disabled,
}

impl Condition {
    pub const ALL: [Self; 6] = [Self::Starting, Self::Ok, Self::Dark, Self::Frozen, Self::Silent, Self::Disabled];

    /// In answers, and as a metric label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ok => "ok",
            Self::Dark => "dark",
            Self::Frozen => "frozen",
            Self::Silent => "silent",
            Self::Disabled => "disabled",
        }
    }

    /// Whether frames in this condition say anything about what is before the camera.
    const fn tells(self) -> bool {
        matches!(self, Self::Ok | Self::Dark)
    }
}

/// What a frame came to.
#[derive(Debug, Clone, Copy)]
pub struct Sight<'a> {
    /// The best label, or `unknown`.
    pub label: &'a str,
    /// Whether the frame shows nothing.
    pub is_flat: bool,
    /// A digest of the file.
    pub bytes: [u8; 32],
    /// A digest of what the model makes of the frame: equal for equal pixels, however they are compressed.
    pub content: [u8; 32],
}

/// The condition of a camera and what it shows, by its last answers.
#[derive(Debug)]
pub struct Progress {
    pub condition: Condition,
    /// What enough of the last answers agree on; none while nothing is to be relied on.
    pub state: Option<String>,
    votes: VecDeque<String>,
    agree: Agree,
    failures: u32,
    last: Option<([u8; 32], [u8; 32])>,
    /// Frames in a row that equal the one before.
    repeats: u32,
    frozen: u32,
}

impl Progress {
    /// `frozen` is the number of equal frames that count as a frozen picture, 0 for never.
    pub fn new(agree: Agree, frozen: u32, enabled: bool) -> Self {
        Self {
            condition: if enabled { Condition::Starting } else { Condition::Disabled },
            state: None,
            votes: VecDeque::new(),
            agree,
            failures: 0,
            last: None,
            repeats: 0,
            frozen,
        }
    }

    /// A frame was answered. Returns whether condition or state have changed.
    pub fn seen(&mut self, sight: Sight<'_>) -> bool {
        self.failures = 0;
        let is_equal = self.last.is_some_and(|(bytes, content)| bytes == sight.bytes || content == sight.content);
        self.repeats = if is_equal { self.repeats.saturating_add(1) } else { 0 };
        self.last = Some((sight.bytes, sight.content));
        let is_frozen = self.frozen > 0 && self.repeats >= self.frozen;
        let condition = match sight {
            Sight { is_flat: true, .. } => Condition::Dark,
            _ if is_frozen => Condition::Frozen,
            _ => Condition::Ok,
        };
        let is_changed = self.become_condition(condition);
        if !condition.tells() {
            return is_changed;
        }
        self.votes.push_back(sight.label.to_owned());
        while self.votes.len() > self.agree.of {
            self.votes.pop_front();
        }
        let votes = self.votes.iter().filter(|vote| *vote == sight.label).count();
        // More than half are needed, so no other label can have enough.
        if votes >= self.agree.need && self.state.as_deref() != Some(sight.label) {
            self.state = Some(sight.label.to_owned());
            return true;
        }
        is_changed
    }

    /// No frame came, or what came is none. Returns whether condition or state have changed.
    pub fn failed(&mut self) -> bool {
        self.failures = self.failures.saturating_add(1);
        self.failures >= SILENT_AFTER && self.become_condition(Condition::Silent)
    }

    /// Attempts in a row that have failed.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    fn become_condition(&mut self, condition: Condition) -> bool {
        if !condition.tells() {
            // What a dead camera showed last says nothing about now.
            self.state = None;
            self.votes.clear();
        }
        std::mem::replace(&mut self.condition, condition) != condition
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A camera that has shown nothing yet, and the number of its last frame.
    fn camera(agree: &str, frozen: u32) -> (Progress, u8) {
        (Progress::new(agree.parse().unwrap(), frozen, true), 0)
    }

    fn show((progress, frame): &mut (Progress, u8), label: &str) -> bool {
        *frame += 1;
        progress.seen(Sight { label, is_flat: label == "unknown", bytes: [*frame; 32], content: [*frame; 32] })
    }

    #[test]
    fn a_state_changes_when_enough_answers_agree() {
        let mut camera = camera("3 of 4", 0);
        let states: Vec<Option<String>> = ["open", "open", "shut", "open", "shut", "shut", "shut", "open"]
            .iter()
            .map(|label| {
                show(&mut camera, label);
                camera.0.state.clone()
            })
            .collect();
        let states: Vec<_> = states.iter().map(Option::as_deref).collect();
        let (open, shut) = (Some("open"), Some("shut"));
        assert_eq!(states, [None, None, None, open, open, shut, shut, shut]);
    }

    #[test]
    fn a_silent_camera_has_no_state_and_begins_anew() {
        let mut camera = camera("2 of 2", 0);
        assert!(show(&mut camera, "open"), "it is not starting any more");
        assert!(show(&mut camera, "open"));
        assert!(!camera.0.failed() && !camera.0.failed());
        assert_eq!(camera.0.state.as_deref(), Some("open"), "one or two frames may get lost");
        assert!(camera.0.failed() && !camera.0.failed());
        assert_eq!((camera.0.condition, camera.0.state.as_deref()), (Condition::Silent, None));
        assert!(show(&mut camera, "open"));
        assert_eq!((camera.0.condition, camera.0.state.as_deref(), camera.0.failures()), (Condition::Ok, None, 0));
        assert!(show(&mut camera, "open"));
    }

    #[test]
    fn a_picture_that_never_changes_is_frozen() {
        let (mut progress, _) = camera("1 of 1", 2);
        let frame =
            |bytes, content| Sight { label: "open", is_flat: false, bytes: [bytes; 32], content: [content; 32] };
        progress.seen(frame(1, 1));
        progress.seen(frame(1, 1));
        assert_eq!((progress.condition, progress.state.as_deref()), (Condition::Ok, Some("open")));
        assert!(progress.seen(frame(2, 1)), "compressed once more, the pixels are the same");
        assert_eq!((progress.condition, progress.state.as_deref()), (Condition::Frozen, None));
        assert!(!progress.seen(frame(3, 1)));
        assert!(progress.seen(frame(4, 2)));
        assert_eq!((progress.condition, progress.state.as_deref()), (Condition::Ok, Some("open")));
    }

    #[test]
    fn a_dark_picture_is_dark_and_unknown() {
        let mut camera = camera("2 of 3", 1);
        for label in ["open", "open", "unknown"] {
            show(&mut camera, label);
        }
        assert_eq!((camera.0.condition, camera.0.state.as_deref()), (Condition::Dark, Some("open")));
        assert!(show(&mut camera, "unknown"));
        assert_eq!(camera.0.state.as_deref(), Some("unknown"));
        let black = Sight { label: "unknown", is_flat: true, bytes: [0; 32], content: [0; 32] };
        camera.0.seen(black);
        camera.0.seen(black);
        assert_eq!(camera.0.condition, Condition::Dark, "rather than frozen");
    }
}
