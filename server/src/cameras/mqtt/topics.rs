//! What topics are called and what is said on them: no connection, no clock.
//!
//! Topics of a gateway whose prefix is `butterflyvit`:
//!
//! | topic | payload |
//! | --- | --- |
//! | `butterflyvit/status` | `online`, or `offline` as the last will |
//! | `butterflyvit/camera/NAME/state` | a label, `unknown`, or `None` while there is none |
//! | `butterflyvit/camera/NAME/score` | of the last frame's best label, or `None` |
//! | `butterflyvit/camera/NAME/reason` | why the last frame is unknown, or `None` |
//! | `butterflyvit/camera/NAME/attributes` | JSON: condition, label, times and more |
//! | `butterflyvit/camera/NAME/availability` | `online` while its frames say something |
//!
//! Home Assistant's side is that of its documentation, `integrations/mqtt` and `integrations/sensor.mqtt`.

use model_core::artifact::store_layout::is_valid_name;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::config::MqttConfig;
use crate::cameras::{CameraView, Condition};

/// Home Assistant's word for a state that is not known.
const NONE: &str = "None";
/// Characters of a state that Home Assistant takes.
const MOST_STATE: usize = 255;
pub const ONLINE: &str = "online";
pub const OFFLINE: &str = "offline";

/// What each camera has topics for.
const PARTS: [&str; 5] = ["state", "score", "reason", "attributes", "availability"];

/// A message that the broker keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retained {
    pub topic: String,
    /// Nothing removes what the broker keeps.
    pub payload: String,
}

/// The names of topics.
#[derive(Debug, Clone)]
pub struct Topics {
    prefix: String,
    discovery: Option<String>,
    /// The gateway in Home Assistant's identifiers.
    node: String,
}

impl Topics {
    pub fn new(config: &MqttConfig) -> Self {
        let topic = identifier(&config.topic);
        let node = if topic.starts_with("butterflyvit") { topic } else { format!("butterflyvit_{topic}") };
        Self { prefix: config.topic.clone(), discovery: config.discovery.clone(), node }
    }

    /// The connection's name at the broker, which knows by it that a new one stands in for an old one.
    pub fn client_id(&self) -> &str {
        &self.node
    }

    pub fn status(&self) -> String {
        format!("{}/status", self.prefix)
    }

    /// Where Home Assistant says that it has started.
    pub fn birth(&self) -> Option<String> {
        self.discovery.as_ref().map(|discovery| format!("{discovery}/status"))
    }

    /// What is subscribed to in order to find cameras that the broker still knows.
    pub fn every_camera(&self) -> String {
        format!("{}/camera/+/availability", self.prefix)
    }

    /// The camera that a topic of [`Topics::every_camera`] is about.
    pub fn camera_of<'a>(&self, topic: &'a str) -> Option<&'a str> {
        let name = topic.strip_prefix(&self.prefix)?.strip_prefix("/camera/")?.strip_suffix("/availability")?;
        is_valid_name(name).then_some(name)
    }

    /// What is subscribed to in order to get pictures: with and without a word that comes back with the answer.
    pub fn every_picture(&self) -> [String; 2] {
        [format!("{}/classify/+", self.prefix), format!("{}/classify/+/+", self.prefix)]
    }

    /// The expert set that a picture is for, and where its answer goes.
    pub fn picture<'a>(&self, topic: &'a str) -> Option<(&'a str, String)> {
        let rest = topic.strip_prefix(&self.prefix)?.strip_prefix("/classify/")?;
        let (set, word) = rest.split_once('/').map_or((rest, ""), |(set, word)| (set, word));
        let is_good = is_valid_name(set) && (word.is_empty() || is_valid_name(word)) && word.len() <= 64;
        is_good.then(|| (set, format!("{}/answer/{rest}", self.prefix)))
    }

    /// All that the broker is to keep about a camera. The labels are those that its state may have, as far as known.
    pub fn camera(&self, view: &CameraView, labels: Option<&[String]>) -> Vec<Retained> {
        let topic = |part: &str| self.of(&view.name, part);
        let text = |value: Option<String>| value.filter(|text| !text.is_empty()).unwrap_or_else(|| NONE.to_owned());
        let payloads = [
            text(view.state.clone().map(|label| shortened(&label))),
            text(view.score.map(|score| format!("{score:.4}"))),
            text(view.unknown_reason.map(|reason| reason.as_str().to_owned())),
            attributes(view).to_string(),
            if tells(view.condition) { ONLINE } else { OFFLINE }.to_owned(),
        ];
        let states = PARTS.iter().zip(payloads).map(|(part, payload)| Retained { topic: topic(part), payload });
        // Home Assistant reads a state once it knows the topic.
        self.announcement(view, labels).into_iter().chain(states).collect()
    }

    /// What removes all that the broker keeps about a camera.
    pub fn forget(&self, name: &str) -> Vec<Retained> {
        let announced = ["state", "score", "condition", "last_seen"].iter().filter_map(|part| self.config(name, part));
        let states = PARTS.iter().map(|part| self.of(name, part));
        announced.chain(states).map(|topic| Retained { topic, payload: String::new() }).collect()
    }

    /// What Home Assistant is told about the gateway itself.
    pub fn gateway(&self) -> Option<Retained> {
        let discovery = self.discovery.as_ref()?;
        let payload = json!({
            "name": "Connection",
            "unique_id": format!("{}_status", self.node),
            "state_topic": self.status(),
            "payload_on": ONLINE,
            "payload_off": OFFLINE,
            "device_class": "connectivity",
            "entity_category": "diagnostic",
            "device": self.gateway_device(),
            "origin": origin(),
        });
        let topic = format!("{discovery}/binary_sensor/{}/status/config", self.node);
        Some(Retained { topic, payload: payload.to_string() })
    }

    fn of(&self, camera: &str, part: &str) -> String {
        format!("{}/camera/{camera}/{part}", self.prefix)
    }

    fn config(&self, camera: &str, part: &str) -> Option<String> {
        let discovery = self.discovery.as_ref()?;
        Some(format!("{discovery}/sensor/{}/{}_{part}/config", self.node, identifier(camera)))
    }

    fn gateway_device(&self) -> Value {
        json!({
            "identifiers": [self.node],
            "name": "ButterflyViT Gateway",
            "manufacturer": "ButterflyViT",
            "model": "Gateway",
            "sw_version": env!("CARGO_PKG_VERSION"),
        })
    }

    fn announcement(&self, view: &CameraView, labels: Option<&[String]>) -> Vec<Retained> {
        let attributes = self.of(&view.name, "attributes");
        let gateway = json!({ "topic": self.status() });
        let both = json!([gateway.clone(), { "topic": self.of(&view.name, "availability") }]);
        let mut state = json!({
            "name": null,
            "state_topic": self.of(&view.name, "state"),
            "json_attributes_topic": attributes,
            "availability": both.clone(),
            "availability_mode": "all",
            "icon": "mdi:cctv",
        });
        if let Some(labels) = labels {
            state["device_class"] = "enum".into();
            state["options"] = options(labels).into();
        }
        let score = json!({
            "name": "Score",
            "state_topic": self.of(&view.name, "score"),
            "state_class": "measurement",
            "suggested_display_precision": 2,
            "entity_category": "diagnostic",
            "availability": both,
            "availability_mode": "all",
        });
        let condition = json!({
            "name": "Condition",
            "state_topic": attributes,
            "value_template": "{{ value_json.condition }}",
            "device_class": "enum",
            "options": Condition::ALL.map(Condition::as_str),
            "entity_category": "diagnostic",
            "availability": [gateway.clone()],
        });
        let last_seen = json!({
            "name": "Last seen",
            "state_topic": attributes,
            "value_template": "{{ value_json.last_seen }}",
            "device_class": "timestamp",
            "entity_category": "diagnostic",
            "availability": [gateway],
        });
        let all = [("state", state), ("score", score), ("condition", condition), ("last_seen", last_seen)];
        all.into_iter().filter_map(|(part, entity)| self.entity(&view.name, part, entity)).collect()
    }

    /// An entity of a camera, with what all of them have.
    fn entity(&self, camera: &str, part: &str, mut entity: Value) -> Option<Retained> {
        let device = format!("{}_{}", self.node, identifier(camera));
        entity["unique_id"] = format!("{device}_{part}").into();
        entity["device"] = json!({
            "identifiers": [device],
            "name": camera,
            "manufacturer": "ButterflyViT",
            "model": "Camera",
            "via_device": self.node,
        });
        entity["origin"] = origin();
        Some(Retained { topic: self.config(camera, part)?, payload: entity.to_string() })
    }
}

/// What Home Assistant may be told as a state.
fn options(labels: &[String]) -> Vec<String> {
    let mut options: Vec<String> = labels.iter().map(|label| shortened(label)).collect();
    options.push("unknown".to_owned());
    options.retain(|label| !label.is_empty());
    options.sort_unstable();
    options.dedup();
    options
}

/// Who wrote the announcement.
fn origin() -> Value {
    json!({ "name": "ButterflyViT Gateway", "sw_version": env!("CARGO_PKG_VERSION") })
}

/// Whether the state of a camera in this condition says anything.
fn tells(condition: Condition) -> bool {
    matches!(condition, Condition::Ok | Condition::Dark)
}

fn attributes(view: &CameraView) -> Value {
    let CameraView { set, label, score, unknown_reason, generation, error, .. } = view;
    json!({
        "condition": view.condition,
        "set": set,
        "label": label,
        "score": score.map(|score| (f64::from(score) * 1e4).round() / 1e4),
        "reason": unknown_reason,
        "generation": generation,
        "since": time(view.since),
        "last_seen": view.last_frame.map(time),
        "error": error,
    })
}

/// A name as Home Assistant's identifiers may be: letters, digits, `-` and `_`. Different names stay different.
fn identifier(name: &str) -> String {
    let plain: String =
        name.chars().map(|sign| if sign.is_ascii_alphanumeric() || sign == '-' { sign } else { '_' }).collect();
    if plain == name {
        return plain;
    }
    let digest = Sha256::digest(name);
    format!("{plain}_{:02x}{:02x}{:02x}", digest[0], digest[1], digest[2])
}

/// As much of a label as Home Assistant takes.
fn shortened(label: &str) -> String {
    label.chars().take(MOST_STATE).collect()
}

/// Seconds since 1970 as ISO 8601 in UTC.
fn time(seconds: f64) -> String {
    let milliseconds = (seconds.max(0.0) * 1e3) as u64;
    let (days, rest) = (milliseconds / 86_400_000, milliseconds % 86_400_000);
    // Civil from days, by Howard Hinnant: years begin in March, so that a leap day is the last of its year.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3_600_000, rest / 60_000 % 60, rest / 1000 % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}+00:00", rest % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topics(topic: &str) -> Topics {
        Topics::new(&MqttConfig {
            is_tls: false,
            host: "broker".into(),
            port: 1883,
            credentials: None,
            ca: None,
            topic: topic.into(),
            discovery: Some("homeassistant".into()),
            classify: true,
        })
    }

    #[test]
    fn only_names_are_taken_from_topics() {
        let topics = topics("butterflyvit");
        assert_eq!(topics.camera_of("butterflyvit/camera/gate/availability"), Some("gate"));
        for topic in ["butterflyvit/camera/../availability", "butterflyvit/camera/a/b/availability", "x/camera/a/state"]
        {
            assert_eq!(topics.camera_of(topic), None, "{topic}");
        }
        let answer = |topic| topics.picture(topic).map(|(set, answer)| (set.to_owned(), answer));
        assert_eq!(answer("butterflyvit/classify/door"), Some(("door".into(), "butterflyvit/answer/door".into())));
        assert_eq!(answer("butterflyvit/classify/door/7"), Some(("door".into(), "butterflyvit/answer/door/7".into())));
        for topic in ["butterflyvit/classify/", "butterflyvit/classify/a/b/c", "butterflyvit/classify/a/#"] {
            assert_eq!(answer(topic), None, "{topic}");
        }
    }

    #[test]
    fn identifiers_are_plain_and_differ() {
        assert_eq!(identifier("gate-2_b"), "gate-2_b");
        let dotted = identifier("gate.2");
        assert!(dotted.starts_with("gate_2_") && dotted != identifier("gate_2"), "{dotted}");
        assert_eq!(topics("butterflyvit").client_id(), "butterflyvit");
        assert!(topics("home/cameras").client_id().starts_with("butterflyvit_home_cameras_"));
    }

    #[test]
    fn times_are_iso_8601() {
        for (seconds, text) in [
            (0.0, "1970-01-01T00:00:00.000+00:00"),
            (951_782_400.0, "2000-02-29T00:00:00.000+00:00"),
            (1_770_000_000.25, "2026-02-02T02:40:00.250+00:00"),
            (4_107_542_399.0, "2100-02-28T23:59:59.000+00:00"),
            (4_107_542_400.0, "2100-03-01T00:00:00.000+00:00"),
        ] {
            assert_eq!(time(seconds), text);
        }
    }

    #[test]
    fn labels_are_as_long_as_home_assistant_takes() {
        let labels = ["ä".repeat(300), String::new(), "b".into(), "unknown".into()];
        assert_eq!(options(&labels), ["b".to_owned(), "unknown".into(), "ä".repeat(255)]);
    }
}
