//! What the broker is told: at the start of a connection everything, later what is new.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use rumqttc::{AsyncClient, PublishOptions, QoS};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tokio_util::sync::CancellationToken;

use super::config::MqttConfig;
use super::pictures::Picture;
use super::topics::{OFFLINE, ONLINE, Retained, Topics};
use super::{Link, other_table};
use crate::cameras::CameraView;

/// How often times and scores are told that are no change.
const REFRESH_EVERY: Duration = Duration::from_secs(30);
/// Everything is told again at most so often, however often somebody says that Home Assistant has started.
const LEAST_BETWEEN: Duration = Duration::from_secs(1);

/// What a connection hears, left for whoever speaks: the one that hears waits for nobody.
pub struct Heard {
    /// The connection to the broker stands.
    pub up: Notify,
    /// Home Assistant has started.
    pub birth: Notify,
    pub strays: mpsc::Sender<String>,
    pub pictures: mpsc::Sender<Picture>,
}

/// Says what is new.
pub struct Speaker<'a> {
    client: &'a AsyncClient,
    topics: &'a Topics,
    link: &'a Link,
    /// What the broker keeps by topic, as far as this connection knows.
    sent: HashMap<String, String>,
    /// Cameras that the broker knows.
    told: BTreeSet<String>,
}

impl<'a> Speaker<'a> {
    pub fn new(client: &'a AsyncClient, topics: &'a Topics, link: &'a Link) -> Self {
        Self { client, topics, link, sent: HashMap::new(), told: BTreeSet::new() }
    }

    /// Speaks until the file or the server wants it to end. Returns whether the connection stood.
    pub async fn run(
        &mut self,
        config: &MqttConfig,
        takes_pictures: bool,
        heard: &Heard,
        found: &mut mpsc::Receiver<String>,
        is_up: &Notify,
        stop: CancellationToken,
    ) -> bool {
        let mut changes = self.link.changes.subscribe();
        let mut file = self.link.file.clone();
        tokio::select! {
            () = heard.up.notified() => is_up.notify_one(),
            () = stop.cancelled() => return false,
            () = other_table(&mut file, config) => return false,
        }
        self.subscribe(takes_pictures).await;
        self.announce().await;
        let mut refresh = interval(REFRESH_EVERY);
        refresh.set_missed_tick_behavior(MissedTickBehavior::Delay);
        refresh.reset();
        let (mut again_at, mut last) = (None, Instant::now());
        loop {
            tokio::select! {
                change = changes.recv() => match change {
                    Ok(view) => self.camera(&view).await,
                    Err(RecvError::Lagged(_)) => self.all().await,
                    Err(RecvError::Closed) => break,
                },
                _ = refresh.tick() => self.all().await,
                () = heard.birth.notified() => {
                    again_at.get_or_insert(last + LEAST_BETWEEN);
                }
                () = sleep_until(again_at.unwrap_or(last)), if again_at.is_some() => {
                    tracing::info!("Home Assistant has started; it is told everything again");
                    self.sent.clear();
                    self.announce().await;
                    (again_at, last) = (None, Instant::now());
                }
                Some(name) = found.recv() => {
                    if self.link.cameras.find(&name).is_none() && self.told.insert(name) {
                        self.all().await;
                    }
                }
                changed = file.changed() => {
                    let now = file.borrow_and_update().clone();
                    if changed.is_err() || now.as_ref() != Some(config) {
                        self.leave(config, now).await;
                        break;
                    }
                    self.all().await;
                }
                () = stop.cancelled() => break,
            }
        }
        self.say(Retained { topic: self.topics.status(), payload: OFFLINE.into() }).await;
        true
    }

    async fn subscribe(&self, takes_pictures: bool) {
        let pictures = takes_pictures.then(|| self.topics.every_picture()).into_iter().flatten();
        let filters = [Some(self.topics.every_camera()), self.topics.birth()].into_iter().flatten();
        for filter in filters.chain(pictures) {
            // An error says that the connection has ended, which is noticed elsewhere.
            drop(self.client.subscribe(filter, QoS::AtMostOnce).await);
        }
    }

    /// The file names another broker, or other topics: what is here is no longer true.
    async fn leave(&mut self, config: &MqttConfig, now: Option<MqttConfig>) {
        let place = |config: &MqttConfig| (config.host.clone(), config.topic.clone(), config.discovery.clone());
        if now.is_some_and(|now| place(&now) == place(config)) {
            return;
        }
        for name in std::mem::take(&mut self.told) {
            self.forget(&name).await;
        }
        if let Some(gateway) = self.topics.gateway() {
            self.say(Retained { payload: String::new(), ..gateway }).await;
        }
    }

    /// Everything that a broker or Home Assistant without a memory has to know.
    async fn announce(&mut self) {
        self.say(Retained { topic: self.topics.status(), payload: ONLINE.into() }).await;
        if let Some(gateway) = self.topics.gateway() {
            self.say(gateway).await;
        }
        self.all().await;
    }

    /// What is so of every camera, and nothing more of those that are gone.
    async fn all(&mut self) {
        let cameras = self.link.cameras.all();
        let names: BTreeSet<String> = cameras.iter().map(|camera| camera.config.name.clone()).collect();
        let before = std::mem::replace(&mut self.told, names.clone());
        for gone in before.difference(&names) {
            tracing::info!(camera = gone, "the broker forgets a camera that is no longer in the file");
            self.forget(gone).await;
        }
        for camera in &cameras {
            self.camera(&camera.view()).await;
        }
    }

    async fn camera(&mut self, view: &CameraView) {
        // A change of a camera that has left the file meanwhile.
        let Some(camera) = self.link.cameras.find(&view.name) else { return };
        for message in self.topics.camera(view, camera.labels().as_deref()) {
            self.say(message).await;
        }
    }

    async fn forget(&mut self, name: &str) {
        for message in self.topics.forget(name) {
            self.say(message).await;
        }
    }

    async fn say(&mut self, Retained { topic, payload }: Retained) {
        if self.sent.get(&topic) == Some(&payload) {
            return;
        }
        let options = PublishOptions::at_least_once().retained();
        // An error says that the connection has ended, which is noticed elsewhere.
        if self.client.publish(topic.as_str(), payload.clone(), options).await.is_ok() {
            if payload.is_empty() {
                self.sent.remove(&topic);
            } else {
                self.sent.insert(topic, payload);
            }
        }
    }
}
