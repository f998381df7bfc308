//! What cameras show, told to an MQTT broker, and pictures that come from there.
//!
//! A connection is a task with queues of its own. What is in them goes with the connection: the next one tells the broker
//! everything anew, so that nothing piles up for a broker that is away. Cameras never wait for the broker. They leave word
//! that something has changed, and the connection reads what is so by then.

pub mod config;
pub mod connection;
pub mod pictures;
pub mod speaker;
pub mod topics;

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::{Notify, broadcast, watch};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use utoipa::ToSchema;

use self::config::MqttConfig;
use self::connection::{Failure, session};
use super::{CameraView, Cameras};
use crate::classify::Classifier;

/// The first rest after a failure; each further one is twice as long.
const FIRST_REST: Duration = Duration::from_secs(1);
const LONGEST_REST: Duration = Duration::from_secs(60);
/// A connection that lasted for less counts as a failure.
const LASTING: Duration = Duration::from_secs(10);
/// How long no pictures are taken after one that was too large to be read.
const NO_PICTURES: Duration = Duration::from_secs(600);

/// The broker as it is now.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct BrokerView {
    /// Its host and its port.
    pub broker: String,
    pub connected: bool,
    /// Why the last attempt failed or the connection ended; null while there is one.
    pub error: Option<String>,
}

/// What a connection needs.
#[derive(Clone)]
pub struct Link {
    pub cameras: Cameras,
    pub classifier: Arc<Classifier>,
    /// Largest picture that is taken.
    pub most_bytes: usize,
    /// The table of the file; also says that the list of cameras has changed.
    pub file: watch::Receiver<Option<MqttConfig>>,
    pub changes: broadcast::Sender<CameraView>,
    pub view: Arc<watch::Sender<Option<BrokerView>>>,
}

impl Link {
    /// Keeps a connection to the broker that the file names until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        while !stop.is_cancelled() {
            let config = self.file.borrow_and_update().clone();
            match config {
                Some(config) => self.keep(config, &stop).await,
                None => tokio::select! {
                    changed = self.file.changed() => if changed.is_err() { return },
                    () = stop.cancelled() => return,
                },
            }
        }
    }

    /// Connects again and again, until the table changes.
    async fn keep(&mut self, config: MqttConfig, stop: &CancellationToken) {
        let name = address(&config);
        self.tell(&name, false, None);
        let (mut rest, mut said) = (FIRST_REST, None);
        let mut no_pictures_until = None;
        loop {
            let takes_pictures = config.classify && no_pictures_until.is_none_or(|until| Instant::now() >= until);
            let started = Instant::now();
            let is_up = Arc::new(Notify::new());
            let session = session(self.clone(), config.clone(), takes_pictures, Arc::clone(&is_up), stop.clone());
            // A task of its own, so that not even a panic ends more than the connection.
            let mut session = AbortOnDropHandle::new(tokio::spawn(session));
            let ended = tokio::select! {
                ended = &mut session => ended,
                () = is_up.notified() => {
                    tracing::info!(broker = name, "connected to the MQTT broker");
                    self.tell(&name, true, None);
                    said = None;
                    session.await
                }
            };
            let failure = match ended {
                Ok(Ok(())) => break,
                Ok(Err(failure)) => failure,
                Err(_) => Failure { reason: "the MQTT client failed".into(), is_too_large: false },
            };
            if failure.is_too_large {
                no_pictures_until = Some(Instant::now() + NO_PICTURES);
            }
            if started.elapsed() >= LASTING {
                rest = FIRST_REST;
            }
            self.tell(&name, false, Some(failure.reason.clone()));
            // The same reason is not said again before a connection stood.
            if said.as_ref() != Some(&failure.reason) {
                tracing::warn!(broker = name, reason = failure.reason, "no MQTT; trying again");
                said = Some(failure.reason);
            }
            tokio::select! {
                () = sleep(rest) => {}
                () = other_table(&mut self.file, &config) => break,
                () = stop.cancelled() => break,
            }
            rest = (rest * 2).min(LONGEST_REST);
        }
        drop(self.classifier.metrics.mqtt_connected.remove_label_values(&[&name]));
        self.view.send_replace(None);
    }

    fn tell(&self, broker: &str, connected: bool, error: Option<String>) {
        self.classifier.metrics.mqtt_connected.with_label_values(&[broker]).set(i64::from(connected));
        self.view.send_replace(Some(BrokerView { broker: broker.to_owned(), connected, error }));
    }
}

fn address(config: &MqttConfig) -> String {
    if config.host.contains(':') {
        format!("[{}]:{}", config.host, config.port)
    } else {
        format!("{}:{}", config.host, config.port)
    }
}

/// Waits until the file names another broker, or none.
pub async fn other_table(file: &mut watch::Receiver<Option<MqttConfig>>, config: &MqttConfig) {
    while file.borrow_and_update().as_ref() == Some(config) {
        if file.changed().await.is_err() {
            return;
        }
    }
}
