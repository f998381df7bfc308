//! Cameras that the gateway asks for pictures by itself: their file, a task for each of them, and what they have shown.
//!
//! Every camera has its own task, connection, time limit and rest after failures, so one that hangs or sends rubbish
//! delays no other. Frames go the way of everybody's images, through admission, decoding and queue; together the cameras
//! are one client, which takes no more than its share.

pub mod authentication;
pub mod camera;
pub mod fetch;
pub mod file;
pub mod mqtt;
pub mod secrets;
pub mod state;

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast, watch};
use tokio_util::sync::CancellationToken;

pub use camera::{Camera, CameraView, Change, FrameResult};
pub use file::CameraConfig;
pub use mqtt::BrokerView;
pub use state::Condition;

use self::file::CameraFile;
use self::mqtt::Link;
use self::mqtt::config::MqttConfig;
use crate::classify::Classifier;
use crate::sentence::sentence;

/// How often the file is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Bytes that the last frames of all cameras may take together, and as many those on their way to clients.
const FRAME_MEMORY: usize = 16 << 20;
/// Changes that a slow reader of events may be behind.
const MOST_BEHIND: usize = 256;
/// Largest picture that is taken over MQTT.
const MOST_MQTT_BYTES: usize = 4 << 20;
/// Readers of events at once.
const MOST_READERS: usize = 16;

/// All cameras; clones share them.
#[derive(Clone)]
pub struct Cameras(Arc<Shared>);

struct Shared {
    list: RwLock<List>,
    changes: broadcast::Sender<CameraView>,
    /// The table `[mqtt]`; sent again whenever the cameras change.
    mqtt: watch::Sender<Option<MqttConfig>>,
    broker: Arc<watch::Sender<Option<BrokerView>>>,
    readers: Arc<Semaphore>,
    /// A place for each byte of the whole frames that are on their way to clients.
    leaving: Arc<Semaphore>,
    /// Cancelled when no more changes will come.
    end: CancellationToken,
}

struct List {
    cameras: Vec<Running>,
    /// Why the file as it is now is not in force.
    file_error: Option<String>,
}

struct Running {
    camera: Arc<Camera>,
    /// Cancelled when the camera leaves the file.
    stop: CancellationToken,
}

/// Reads changes; counts as a reader until dropped.
pub struct Reader {
    pub changes: broadcast::Receiver<CameraView>,
    pub end: CancellationToken,
    _place: OwnedSemaphorePermit,
}

/// A whole frame that gives its place back once it has left, however slowly it is read.
struct Leaving {
    frame: Bytes,
    _place: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Leaving {
    fn as_ref(&self) -> &[u8] {
        &self.frame
    }
}

impl Default for Cameras {
    /// There are none, and no changes will come.
    fn default() -> Self {
        let cameras = Self::new(CameraFile { cameras: Vec::new(), mqtt: None });
        cameras.0.end.cancel();
        cameras
    }
}

impl Cameras {
    fn new(CameraFile { cameras: configs, mqtt }: CameraFile) -> Self {
        let keep = FRAME_MEMORY / configs.len().max(1);
        let running = |config| Running { camera: Arc::new(Camera::new(config, keep)), stop: CancellationToken::new() };
        let list = List { cameras: configs.into_iter().map(running).collect(), file_error: None };
        Self(Arc::new(Shared {
            list: RwLock::new(list),
            changes: broadcast::Sender::new(MOST_BEHIND),
            mqtt: watch::Sender::new(mqtt),
            broker: Arc::default(),
            readers: Arc::new(Semaphore::new(MOST_READERS)),
            leaving: Arc::new(Semaphore::new(FRAME_MEMORY)),
            end: CancellationToken::new(),
        }))
    }

    /// The cameras of a file, which [`Cameras::run`] is to ask for pictures.
    ///
    /// # Errors
    /// A sentence that names the file, the camera and the reason.
    pub fn open(path: &Path, classifier: &Classifier) -> anyhow::Result<Self> {
        read(path, classifier).map(Self::new)
    }

    /// Every camera, in the order of the file.
    pub fn all(&self) -> Vec<Arc<Camera>> {
        let list = self.0.list.read().unwrap_or_else(PoisonError::into_inner);
        list.cameras.iter().map(|running| Arc::clone(&running.camera)).collect()
    }

    /// One camera by its name.
    pub fn find(&self, name: &str) -> Option<Arc<Camera>> {
        self.all().into_iter().find(|camera| camera.config.name == name)
    }

    /// Why the file as it is now is not in force.
    pub fn file_error(&self) -> Option<String> {
        self.0.list.read().unwrap_or_else(PoisonError::into_inner).file_error.clone()
    }

    /// The MQTT broker, if the file names one.
    pub fn broker(&self) -> Option<BrokerView> {
        self.0.broker.borrow().clone()
    }

    /// A frame to be sent as it is, as long as there is a place for it beside the others on their way.
    pub fn leaving(&self, frame: Bytes) -> Option<Bytes> {
        let place = Arc::clone(&self.0.leaving).try_acquire_many_owned(frame.len() as u32).ok()?;
        Some(Bytes::from_owner(Leaving { frame, _place: place }))
    }

    /// A reader of changes, as long as there is a place for one.
    pub fn reader(&self) -> Option<Reader> {
        let place = Arc::clone(&self.0.readers).try_acquire_owned().ok()?;
        Some(Reader { changes: self.0.changes.subscribe(), end: self.0.end.clone(), _place: place })
    }

    /// Asks the cameras for pictures until `stop`, tells the broker what they show, and looks whether the file has
    /// changed. A file that is wrong leaves everything as it is. Pictures over MQTT have at most `most_bytes`.
    pub async fn run(
        self,
        path: PathBuf,
        classifier: Arc<Classifier>,
        default_set: String,
        most_bytes: usize,
        stop: CancellationToken,
    ) {
        let link = Link {
            cameras: self.clone(),
            classifier: Arc::clone(&classifier),
            most_bytes: most_bytes.min(MOST_MQTT_BYTES),
            file: self.0.mqtt.subscribe(),
            changes: self.0.changes.clone(),
            view: Arc::clone(&self.0.broker),
        };
        let link = tokio::spawn(link.run(stop.clone()));
        self.declare(&classifier);
        let count = self.all().len();
        for index in 0..count {
            self.start(index, count, &classifier, &default_set);
        }
        tracing::info!(cameras = count, "cameras are asked for pictures");
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = stop.cancelled() => break,
            }
            let (file, asked) = (path.clone(), Arc::clone(&classifier));
            let read = tokio::task::spawn_blocking(move || read(&file, &asked)).await.map_err(anyhow::Error::from);
            match read.flatten() {
                Ok(file) if self.is_in_force(&file) => {}
                Ok(CameraFile { cameras, mqtt }) => {
                    self.replace(cameras, &classifier, &default_set);
                    self.0.mqtt.send_replace(mqtt);
                }
                Err(error) => {
                    let reason = sentence(&error);
                    let mut list = self.0.list.write().unwrap_or_else(PoisonError::into_inner);
                    // The same reason is said once.
                    if list.file_error.as_ref() != Some(&reason) {
                        tracing::warn!(reason, "the file of cameras cannot be used; the cameras stay as they are");
                        list.file_error = Some(reason);
                    }
                }
            }
        }
        self.0.end.cancel();
        // It says goodbye while the server drains.
        drop(link.await);
        let list = self.0.list.read().unwrap_or_else(PoisonError::into_inner);
        list.cameras.iter().for_each(|running| running.stop.cancel());
    }

    /// Whether the file, and the files it names, say what they said before.
    fn is_in_force(&self, file: &CameraFile) -> bool {
        let list = self.0.list.read().unwrap_or_else(PoisonError::into_inner);
        let now = list.cameras.iter().map(|running| &running.camera.config);
        list.file_error.is_none() && now.eq(&file.cameras) && *self.0.mqtt.borrow() == file.mqtt
    }

    /// Cameras that are in the file as before go on; those that are gone or different stop, and new ones start.
    fn replace(&self, configs: Vec<CameraConfig>, classifier: &Arc<Classifier>, default_set: &str) {
        let keep = FRAME_MEMORY / configs.len().max(1);
        let mut started = Vec::new();
        {
            let mut list = self.0.list.write().unwrap_or_else(PoisonError::into_inner);
            let mut before = std::mem::take(&mut list.cameras);
            for (index, config) in configs.into_iter().enumerate() {
                let same = before.iter().position(|running| running.camera.config == config);
                list.cameras.push(same.map(|at| before.swap_remove(at)).unwrap_or_else(|| {
                    started.push(index);
                    Running { camera: Arc::new(Camera::new(config, keep)), stop: CancellationToken::new() }
                }));
            }
            before.iter().for_each(|running| running.stop.cancel());
            list.file_error = None;
            tracing::info!(cameras = list.cameras.len(), started = started.len(), "the file of cameras has changed");
        }
        self.declare(classifier);
        let count = started.len();
        for index in started {
            self.start(index, count, classifier, default_set);
        }
    }

    fn start(&self, index: usize, count: usize, classifier: &Arc<Classifier>, default_set: &str) {
        let list = self.0.list.read().unwrap_or_else(PoisonError::into_inner);
        let Some(Running { camera, stop }) = list.cameras.get(index) else { return };
        let (camera, stop) = (Arc::clone(camera), stop.clone());
        let (classifier, default_set, shared) = (Arc::clone(classifier), default_set.to_owned(), Arc::clone(&self.0));
        // Spread over the interval, so that frames do not come all at once.
        let delay = camera.config.every.mul_f64((index % count.max(1)) as f64 / count.max(1) as f64);
        tokio::spawn(async move {
            // Without readers nobody hears of it, which is no error.
            let changed = |camera: &Camera| drop(shared.changes.send(camera.view()));
            camera.run(&classifier, &default_set, delay, stop, changed).await;
        });
    }

    /// The series of metrics are those of the cameras in the file.
    fn declare(&self, classifier: &Classifier) {
        let names: Vec<String> = self.all().iter().map(|camera| camera.config.name.clone()).collect();
        let results = FrameResult::ALL.map(FrameResult::as_str);
        classifier.metrics.declare_cameras(&names, &results);
    }
}

fn read(path: &Path, classifier: &Classifier) -> anyhow::Result<CameraFile> {
    file::read(path, |set| classifier.registry.lookup(set, None).is_ok())
}
