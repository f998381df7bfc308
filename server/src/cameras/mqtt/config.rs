//! The table `[mqtt]` of the camera file: one broker, and how topics are called there.

use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail, ensure};
use hyper::Uri;
use serde::Deserialize;

use crate::cameras::secrets::{Credentials, Secrets, read_certificates};

/// Longest prefix of topics.
const MOST_PREFIX_BYTES: usize = 128;

/// A broker, as the file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MqttConfig {
    pub is_tls: bool,
    pub host: String,
    pub port: u16,
    pub credentials: Option<Credentials>,
    /// Certificates in PEM of whoever signed the broker's; without them those of the system.
    pub ca: Option<Vec<u8>>,
    /// What every topic of this gateway begins with.
    pub topic: String,
    /// What Home Assistant's topics begin with; none when it is to hear nothing.
    pub discovery: Option<String>,
    /// Whether pictures that come over MQTT are classified.
    pub classify: bool,
}

/// The table as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MqttEntry {
    url: String,
    user: Option<String>,
    password: Option<String>,
    password_file: Option<PathBuf>,
    ca: Option<PathBuf>,
    topic: Option<String>,
    discovery: Option<Discovery>,
    classify: Option<bool>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Discovery {
    Topic(String),
    Switch(bool),
}

impl MqttEntry {
    /// # Errors
    /// A sentence that names the key and the reason.
    pub fn check(self, folder: &Path) -> anyhow::Result<MqttConfig> {
        let uri: Uri = self.url.parse().map_err(|_| anyhow!("`url` is no address"))?;
        let is_tls = match uri.scheme_str() {
            Some("mqtt") => false,
            Some("mqtts") => true,
            _ => bail!("`url` begins with mqtt:// or mqtts://"),
        };
        let authority = uri.authority().context("`url` names no host")?;
        ensure!(!authority.as_str().contains('@'), "`url` holds no user; write `user` and `password_file` instead");
        let is_bare = uri.path_and_query().is_none_or(|path| path.as_str() == "/");
        ensure!(is_bare, "`url` is a host and a port; what topics begin with is `topic`");
        let host = authority.host().trim_matches(['[', ']']).to_owned();
        ensure!(!host.is_empty(), "`url` names no host");
        ensure!(is_tls || self.ca.is_none(), "`ca` goes with mqtts://");
        let secrets = Secrets { user: self.user, password: self.password, password_file: self.password_file };
        Ok(MqttConfig {
            is_tls,
            host,
            port: authority.port_u16().unwrap_or(if is_tls { 8883 } else { 1883 }),
            credentials: secrets.read(folder)?,
            ca: self.ca.map(|path| read_certificates(folder, &path)).transpose()?,
            topic: prefix("topic", self.topic.as_deref().unwrap_or("butterflyvit"))?,
            discovery: match self.discovery {
                None => Some("homeassistant".to_owned()),
                Some(Discovery::Topic(topic)) => Some(prefix("discovery", &topic)?),
                Some(Discovery::Switch(false)) => None,
                Some(Discovery::Switch(true)) => bail!("`discovery` is a topic or `false`"),
            },
            classify: self.classify.unwrap_or(true),
        })
    }
}

/// Levels of letters, digits and a few signs, so that no wildcard and no level without a name gets into a topic.
fn prefix(key: &str, text: &str) -> anyhow::Result<String> {
    let is_level = |level: &str| {
        !level.is_empty() && level.chars().all(|sign| sign.is_ascii_alphanumeric() || matches!(sign, '-' | '_' | '.'))
    };
    ensure!(
        text.len() <= MOST_PREFIX_BYTES && text.split('/').all(is_level),
        "`{key}` is one to {MOST_PREFIX_BYTES} letters, digits, `-`, `_` or `.`, with single slashes between them"
    );
    Ok(text.to_owned())
}
