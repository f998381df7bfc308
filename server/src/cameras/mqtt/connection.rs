//! One connection to the broker, from its start to its end.

use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;
use rumqttc::{
    AsyncClient, Broker, ConnectReturnCode, ConnectionError, Event, EventLoop, LastWill, MqttOptions, NetworkOptions,
    Packet, Publish, PublishOptions, QoS, StateError, TlsConfiguration, TlsError, Transport,
};
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::Link;
use super::config::MqttConfig;
use super::pictures::Picture;
use super::speaker::{Heard, Speaker};
use super::topics::{OFFLINE, ONLINE, Topics};
use crate::cameras::secrets::{no_tls, trust};
use crate::repeats::REPEATS;
use crate::sentence::sentence;

/// Messages that wait for the broker.
const QUEUE: usize = 64;
/// Pictures that wait while one is classified.
const MOST_PICTURES: usize = 2;
/// Cameras found at the broker that wait to be looked at.
const MOST_STRAYS: usize = 256;
/// Largest message that is read at all; a larger one ends the connection.
const MOST_PACKET_BYTES: usize = 16 << 20;
/// Largest message that is sent.
const MOST_SENT_BYTES: usize = 1 << 20;
/// Seconds between signs of life to the broker.
const KEEP_ALIVE: u16 = 15;
/// Time to say goodbye.
const GOODBYE: Duration = Duration::from_secs(2);

/// Why a connection ended.
pub struct Failure {
    pub reason: String,
    /// Whether a message was too large to be read.
    pub is_too_large: bool,
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self { reason: sentence(&error), is_too_large: false }
    }
}

fn options(config: &MqttConfig, topics: &Topics) -> anyhow::Result<MqttOptions> {
    let mut options = MqttOptions::new(topics.client_id(), Broker::tcp(config.host.clone(), config.port));
    options
        .set_keep_alive(KEEP_ALIVE)
        .set_clean_session(true)
        .set_max_packet_size(MOST_PACKET_BYTES, MOST_SENT_BYTES)
        // One message is read after the other, so that large ones do not stand in memory together.
        .set_read_batch_size(1)
        .set_last_will(LastWill::new(topics.status(), OFFLINE, QoS::AtLeastOnce, true));
    if let Some(credentials) = &config.credentials {
        options.set_credentials(credentials.user.clone(), credentials.password.clone().into_bytes());
    }
    if config.is_tls {
        options.set_transport(Transport::Tls(TlsConfiguration::Rustls(trust(config.ca.as_deref())?)));
    }
    Ok(options)
}

/// One connection, from its start to its end: `Ok` when it ended on purpose.
///
/// # Errors
/// What ended the connection, or kept it from its start.
pub async fn session(
    link: Link,
    config: MqttConfig,
    takes_pictures: bool,
    is_up: Arc<Notify>,
    stop: CancellationToken,
) -> Result<(), Failure> {
    let topics = Topics::new(&config);
    let (client, mut events) = AsyncClient::builder(options(&config, &topics)?).capacity(QUEUE).build();
    let mut network = NetworkOptions::new();
    network.set_tcp_nodelay(true);
    events.set_network_options(network);
    let (strays, mut found) = mpsc::channel(MOST_STRAYS);
    let (pictures, mut waiting) = mpsc::channel(MOST_PICTURES);
    let heard = Heard { up: Notify::new(), birth: Notify::new(), strays, pictures };
    let has_credentials = config.credentials.is_some();
    let most = link.most_bytes;
    let hear = hear(events, &topics, &heard, (&client, most), has_credentials);
    tokio::pin!(hear);
    let mut speaker = Speaker::new(&client, &topics, &link);
    let classify = async {
        while let Some(picture) = waiting.recv().await {
            let (topic, answer) = picture.answer(&link.classifier).await;
            // An error says that the connection has ended, which is noticed elsewhere.
            drop(client.publish(topic, answer, PublishOptions::at_least_once()).await);
        }
    };
    let speak = speaker.run(&config, takes_pictures, &heard, &mut found, &is_up, stop);
    tokio::select! {
        failure = &mut hear => return Err(failure),
        was_up = speak => if !was_up { return Ok(()) },
        () = classify => {}
    }
    // What has been said is to arrive.
    drop(client.disconnect().await);
    let _ = timeout(GOODBYE, hear).await;
    Ok(())
}

/// Reads and writes until the connection ends.
async fn hear(
    mut events: EventLoop,
    topics: &Topics,
    heard: &Heard,
    (client, most): (&AsyncClient, usize),
    has_credentials: bool,
) -> Failure {
    let mut is_up = false;
    loop {
        match events.poll().await {
            // The library would connect again by itself, with what is in its queues.
            Ok(Event::Incoming(Packet::ConnAck(_))) if is_up => {
                return anyhow!("the connection broke").into();
            }
            Ok(Event::Incoming(Packet::ConnAck(_))) => {
                is_up = true;
                heard.up.notify_one();
            }
            Ok(Event::Incoming(Packet::Publish(message))) => take(message, topics, heard, (client, most)),
            Ok(_) => {}
            Err(error) => return failure(error, is_up, has_credentials),
        }
    }
}

/// Leaves a message for whoever it is for. A picture of more than `most` bytes is refused here, so that none waits.
fn take(message: Publish, topics: &Topics, heard: &Heard, (client, most): (&AsyncClient, usize)) {
    let Ok(topic) = std::str::from_utf8(&message.topic) else { return };
    if topics.birth().as_deref() == Some(topic) {
        if message.payload == ONLINE.as_bytes() {
            heard.birth.notify_one();
        }
    } else if let Some(name) = topics.camera_of(topic) {
        if message.retain && !message.payload.is_empty() {
            // The next connection finds those for which there is no room now.
            drop(heard.strays.try_send(name.to_owned()));
        }
    } else if let Some((set, answer_to)) = topics.picture(topic) {
        // What the broker keeps would be answered at every connection.
        if message.retain {
            return;
        }
        let picture = Picture { set: set.to_owned(), answer_to, bytes: message.payload };
        let refused = match picture.bytes.len() {
            bytes if bytes > most => {
                Some(picture.refusal(&format!("the picture has {bytes} bytes; {most} are the most over MQTT")))
            }
            _ => heard
                .pictures
                .try_send(picture)
                .err()
                .map(|full| full.into_inner().refusal("too many pictures wait to be classified; try again later")),
        };
        if let Some((topic, answer)) = refused {
            drop(client.try_publish(topic, answer, PublishOptions::at_least_once()));
        }
    } else if let Some(repeated) = REPEATS.admit("mqtt topic") {
        let topic: String = topic.chars().take(200).collect();
        tracing::warn!(topic, repeated, "an MQTT message whose topic names no expert set");
    }
}

/// What went wrong, for whoever looks after the broker.
fn failure(error: ConnectionError, is_up: bool, has_credentials: bool) -> Failure {
    use rumqttc::Error::PayloadSizeLimitExceeded;
    let is_too_large = |error: &ConnectionError| {
        matches!(error, ConnectionError::MqttState(StateError::Deserialization(PayloadSizeLimitExceeded(_))))
    };
    let too_large = is_too_large(&error);
    let reason = match error {
        ConnectionError::ConnectionRefused(code) => match code {
            ConnectReturnCode::BadUserNamePassword | ConnectReturnCode::NotAuthorized if has_credentials => {
                "the broker does not accept this user and password".to_owned()
            }
            ConnectReturnCode::BadUserNamePassword | ConnectReturnCode::NotAuthorized => {
                "the broker wants a user and a password".to_owned()
            }
            ConnectReturnCode::BadClientId => "the broker does not accept the name of this client".to_owned(),
            ConnectReturnCode::ServiceUnavailable => "the broker says that it is not available".to_owned(),
            _ => "the broker speaks another version of MQTT than 3.1.1".to_owned(),
        },
        _ if too_large => {
            format!("a message has more than {MOST_PACKET_BYTES} bytes; no pictures are taken for a while")
        }
        ConnectionError::Tls(TlsError::Io(error)) => no_tls(&error),
        ConnectionError::Tls(error) => format!("TLS: {error}"),
        ConnectionError::Io(error) | ConnectionError::MqttState(StateError::Io(error)) if is_up => {
            format!("the connection broke: {error}")
        }
        ConnectionError::Io(error) | ConnectionError::MqttState(StateError::Io(error)) => {
            format!("cannot connect: {error}")
        }
        ConnectionError::NetworkTimeout | ConnectionError::FlushTimeout => "the broker gives no answer".to_owned(),
        ConnectionError::MqttState(StateError::AwaitPingResp) => "the broker has stopped to answer".to_owned(),
        ConnectionError::MqttState(StateError::ConnectionAborted) => "the broker has closed the connection".to_owned(),
        error => format!("this is no MQTT: {error}"),
    };
    Failure { reason, is_too_large: too_large }
}
