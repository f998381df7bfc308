//! Pictures that come over MQTT, and their answers.

use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use serde_json::json;
use tokio::time::Instant;

use crate::admission::Client;
use crate::classify::{Classifier, Image, Look, Prediction, Request, predictions};
use crate::keys::Caller;
use crate::verdict::Verdict;

/// Longest time from a picture to its answer.
const ANSWER_TIME: Duration = Duration::from_secs(10);
/// Labels of an answer.
const TOP_K: usize = 5;

/// A picture to classify.
pub struct Picture {
    pub set: String,
    /// The topic of the answer.
    pub answer_to: String,
    pub bytes: Bytes,
}

impl Picture {
    /// The topic of the answer, and why there is none.
    pub fn refusal(self, reason: &str) -> (String, String) {
        (self.answer_to, json!({ "set": self.set, "error": reason }).to_string())
    }

    /// The topic of the answer, and the answer.
    pub async fn answer(self, classifier: &Classifier) -> (String, String) {
        match classify(&self.set, self.bytes.clone(), classifier).await {
            Ok(answer) => (self.answer_to, answer),
            Err(reason) => self.refusal(&reason),
        }
    }
}

async fn classify(set: &str, bytes: Bytes, classifier: &Classifier) -> Result<String, String> {
    if bytes.is_empty() {
        return Err("the message is empty; send a picture file as it is".into());
    }
    // All that comes over MQTT is one client of the gateway, together with its cameras.
    let mut permit = classifier.admission.body(Client::UNKNOWN).map_err(|refused| refused.to_string())?;
    permit.hold(bytes.len()).map_err(|refused| refused.to_string())?;
    let entered = classifier.admission.enter(&Caller::default(), Client::UNKNOWN);
    let mut entry = entered.map_err(|refused| refused.to_string())?;
    let started = Instant::now();
    let request = Request {
        set: set.to_owned(),
        version: None,
        images: vec![Ok(Image::Encoded(bytes))],
        routing: false,
        look: Look::default(),
        min_score: None,
        started,
        deadline: started + ANSWER_TIME,
    };
    let answers = classifier.answer(&mut entry, request).await.map_err(|error| error.to_string())?;
    let answer = answers.images.into_iter().next().ok_or("there is no answer")?.map_err(|error| error.to_string())?;
    let found = Answer {
        set,
        version: answers.lease.descriptor.version,
        generation: answers.lease.descriptor.generation(),
        predictions: predictions(&answer.logits, answers.lease.value.labels(), TOP_K),
        verdict: answer.verdict,
    };
    serde_json::to_string(&found).map_err(|error| error.to_string())
}

/// As `POST /classify` answers, in short.
#[derive(Serialize)]
struct Answer<'a> {
    set: &'a str,
    version: u64,
    generation: String,
    predictions: Vec<Prediction>,
    #[serde(flatten)]
    verdict: Verdict,
}
