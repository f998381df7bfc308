//! The file of cameras: TOML, read at start and again when it changes. Whatever is wrong with it is a sentence that names
//! the file, the camera and the reason.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use hyper::Uri;
use model_core::artifact::store_layout;
use model_core::image::{Crop, Fit};
use serde::Deserialize;

use super::mqtt::config::{MqttConfig, MqttEntry};
use super::secrets::{Credentials, Secrets, read_bounded, read_certificates};
use crate::classify::Look;
use crate::units::{ByteSize, parse_duration};
use crate::verdict::MinScore;

/// Most cameras of one file.
pub const MOST_CAMERAS: usize = 64;
/// Most answers that are asked to agree.
const MOST_ANSWERS: usize = 32;
/// The most often that a camera may be asked.
const LEAST_EVERY: Duration = Duration::from_millis(50);

/// Where a camera's pictures come from. Nothing else is ever fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    pub is_tls: bool,
    pub host: String,
    pub port: u16,
    pub path: String,
}

impl FromStr for Address {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let uri: Uri = text.parse().map_err(|_| anyhow!("`url` is no address"))?;
        let is_tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => bail!("`url` begins with http:// or https://"),
        };
        let authority = uri.authority().context("`url` names no host")?;
        ensure!(!authority.as_str().contains('@'), "`url` holds no user; write `user` and `password` instead");
        let host = authority.host().trim_matches(['[', ']']).to_owned();
        ensure!(!host.is_empty(), "`url` names no host");
        let port = authority.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
        let path = uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        Ok(Self { is_tls, host, port, path })
    }
}

impl Address {
    /// The value of the header `Host`.
    pub fn authority(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        if self.port == if self.is_tls { 443 } else { 80 } { host } else { format!("{host}:{}", self.port) }
    }

    /// Where a redirect leads, as long as that is on the same host.
    pub fn redirected(&self, location: &str) -> Option<Self> {
        let path = if location.contains("://") {
            let other: Self = location.parse().ok()?;
            let is_same = (other.is_tls, other.port, &other.host.to_lowercase())
                == (self.is_tls, self.port, &self.host.to_lowercase());
            is_same.then_some(other.path)?
        } else if location.starts_with("//") {
            return None;
        } else if location.starts_with('/') {
            location.to_owned()
        } else {
            let path = self.path.split('?').next().unwrap_or_default();
            let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
            if location.starts_with('?') { format!("{path}{location}") } else { format!("{folder}/{location}") }
        };
        Some(Self { path, ..self.clone() })
    }
}

/// How many of the last answers have to agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agree {
    pub need: usize,
    pub of: usize,
}

impl FromStr for Agree {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let number = |text: &str| text.trim().parse::<usize>().ok();
        let parts = text.split_once("of").and_then(|(need, of)| Some((number(need)?, number(of)?)));
        let (need, of) = parts.context("`agree` is written like `3 of 4`")?;
        ensure!((1..=MOST_ANSWERS).contains(&of), "`agree` looks at 1 to {MOST_ANSWERS} answers");
        // With half of them, two labels could have enough at once.
        ensure!(need <= of && need * 2 > of, "`agree` needs more than half of the {of} answers, and not more than all");
        Ok(Self { need, of })
    }
}

/// One camera, as the file says.
#[derive(Debug, Clone, PartialEq)]
pub struct CameraConfig {
    pub name: String,
    pub address: Address,
    pub credentials: Option<Credentials>,
    /// Certificates in PEM of whoever signed the camera's; without them those of the system.
    pub ca: Option<Vec<u8>>,
    pub every: Duration,
    /// Longest time for one picture.
    pub timeout: Duration,
    pub max_bytes: usize,
    /// The default set when absent.
    pub set: Option<String>,
    pub look: Look,
    pub agree: Agree,
    pub min_score: Option<MinScore>,
    /// Equal frames after which the picture counts as frozen; 0 for never.
    pub frozen: u32,
    pub enabled: bool,
}

/// What the file says.
#[derive(Debug, Clone, PartialEq)]
pub struct CameraFile {
    pub cameras: Vec<CameraConfig>,
    /// The broker that hears what the cameras show, if there is one.
    pub mqtt: Option<MqttConfig>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    mqtt: Option<toml::Table>,
    #[serde(default)]
    camera: Vec<toml::Table>,
}

/// A table of the file as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    url: String,
    user: Option<String>,
    password: Option<String>,
    password_file: Option<PathBuf>,
    ca: Option<PathBuf>,
    every: Option<String>,
    timeout: Option<String>,
    max_bytes: Option<String>,
    set: Option<String>,
    crop: Option<String>,
    fit: Option<String>,
    agree: Option<String>,
    min_score: Option<f32>,
    frozen: Option<u32>,
    enabled: Option<bool>,
}

/// Reads the file and what it names. `is_set` says whether an expert set is registered.
///
/// # Errors
/// A sentence that names the file, the camera and the reason.
pub fn read(path: &Path, is_set: impl Fn(&str) -> bool) -> anyhow::Result<CameraFile> {
    let in_file = || path.display().to_string();
    let text = read_bounded(path)
        .and_then(|bytes| String::from_utf8(bytes).map_err(|_| anyhow!("the file is no text")))
        .with_context(in_file)?;
    parse(&text, path.parent().unwrap_or(Path::new("")), is_set).with_context(in_file)
}

fn parse(text: &str, folder: &Path, is_set: impl Fn(&str) -> bool) -> anyhow::Result<CameraFile> {
    let file: File = toml::from_str(text).map_err(|error| anyhow!("{}", one_line(&error, text)))?;
    ensure!(file.camera.len() <= MOST_CAMERAS, "there are {} cameras; {MOST_CAMERAS} are the most", file.camera.len());
    let mut names = HashSet::new();
    let mut cameras = Vec::new();
    for (index, table) in file.camera.into_iter().enumerate() {
        let name = table.get("name").and_then(toml::Value::as_str).map(str::to_owned);
        let camera = || name.as_ref().map_or(format!("camera {}", index + 1), |name| format!("camera `{name}`"));
        let entry = Entry::deserialize(table).map_err(|error| anyhow!("{}", error.message())).with_context(camera)?;
        let config = entry.check(folder).with_context(camera)?;
        if let Some(set) = config.set.as_ref().filter(|set| !is_set(set)) {
            return Err(anyhow!("there is no expert set `{set}`")).with_context(camera);
        }
        // Topics and labels of metrics are made of names; some readers of those do not tell cases apart.
        ensure!(names.insert(config.name.to_lowercase()), "two cameras are called `{}`", config.name);
        cameras.push(config);
    }
    let mqtt = file.mqtt.map(|table| {
        let entry = MqttEntry::deserialize(table).map_err(|error| anyhow!("{}", error.message()))?;
        entry.check(folder)
    });
    Ok(CameraFile { cameras, mqtt: mqtt.transpose().context("[mqtt]")? })
}

/// What TOML's parser says, with the line, without the picture of the line: it may hold a password.
fn one_line(error: &toml::de::Error, text: &str) -> String {
    let line = error.span().map(|span| text.bytes().take(span.start).filter(|&byte| byte == b'\n').count() + 1);
    let message = error.message().replace('\n', ", ");
    line.map_or(message.clone(), |line| format!("line {line}: {message}"))
}

impl Entry {
    fn check(self, folder: &Path) -> anyhow::Result<CameraConfig> {
        ensure!(
            store_layout::is_valid_name(&self.name) && self.name.len() <= 64,
            "{}, here at most 64",
            store_layout::NAME_RULE
        );
        let time = |name: &str, text: &Option<String>, default: &str| {
            parse_duration(text.as_deref().unwrap_or(default)).map_err(|reason| anyhow!("`{name}`: {reason}"))
        };
        let every = time("every", &self.every, "5s")?;
        ensure!(every >= LEAST_EVERY, "`every` is at least {} ms", LEAST_EVERY.as_millis());
        let timeout = time("timeout", &self.timeout, "5s")?;
        ensure!(!timeout.is_zero() && timeout <= Duration::from_secs(60), "`timeout` is more than 0 and at most 60s");
        let max_bytes = self.max_bytes.as_deref().unwrap_or("4MiB").parse::<ByteSize>();
        let max_bytes = max_bytes.map_err(|reason| anyhow!("`max_bytes`: {reason}"))?.0;
        ensure!((1..=16 << 20).contains(&max_bytes), "`max_bytes` is 1 byte to 16 MiB");
        let secrets = Secrets { user: self.user, password: self.password, password_file: self.password_file };
        let credentials = secrets.read(folder)?;
        if let Some(Credentials { user, .. }) = &credentials {
            ensure!(!user.contains(':'), "`user` holds no colon");
        }
        let look = Look {
            crop: self.crop.map(|text| text.parse::<Crop>()).transpose()?,
            fit: self.fit.map(|text| text.parse::<Fit>()).transpose()?,
        };
        let address: Address = self.url.parse()?;
        ensure!(address.is_tls || self.ca.is_none(), "`ca` goes with https://");
        Ok(CameraConfig {
            name: self.name,
            address,
            credentials,
            ca: self.ca.map(|path| read_certificates(folder, &path)).transpose()?,
            every,
            timeout,
            max_bytes,
            set: self.set,
            look,
            agree: self.agree.as_deref().unwrap_or("3 of 4").parse()?,
            min_score: self.min_score.map(MinScore::try_from).transpose()?,
            frozen: self.frozen.unwrap_or(60),
            enabled: self.enabled.unwrap_or(true),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Vec<CameraConfig>, String> {
        let parsed = parse(text, Path::new("/nowhere"), |set| set == "door");
        parsed.map(|file| file.cameras).map_err(|error| crate::sentence::sentence(&error))
    }

    #[test]
    fn a_file_says_what_it_has_to() {
        let text = r#"
            [[camera]]
            name = "garage"
            url = "http://192.168.1.20:8080/snap.jpg?size=2"
            user = "viewer"
            password = "secret"
            every = "500ms"
            set = "door"
            crop = "0.25,0,0.5,1"
            fit = "pad"
            agree = "2 of 3"
            min_score = 0.6
            [[camera]]
            name = "gate"
            url = "https://[::1]/"
            enabled = false
        "#;
        let cameras = parsed(text).unwrap();
        let [garage, gate] = cameras.as_slice() else { panic!("{cameras:?}") };
        assert_eq!(garage.address.authority(), "192.168.1.20:8080");
        assert_eq!(garage.address.path, "/snap.jpg?size=2");
        assert_eq!((garage.agree.need, garage.agree.of, garage.every.as_millis()), (2, 3, 500));
        assert_eq!((gate.address.authority().as_str(), gate.address.port, gate.enabled), ("[::1]", 443, false));
        assert!(!format!("{garage:?}").contains("secret"));
        assert_eq!(parsed(""), Ok(vec![]));
    }

    #[test]
    fn what_is_wrong_is_said_with_the_camera() {
        let url = "url = 'http://a/b.jpg'";
        let cases = [
            ("[[camera]]\nname = 'a'\nurl = 'http://a/'\nevrey = '1s'".to_owned(), "camera `a`: unknown field `evrey`"),
            (format!("[[camera]]\n{url}"), "camera 1: missing field `name`"),
            (format!("[[camera]]\nname = '../x'\n{url}"), "a name has"),
            (format!("[[camera]]\nname = 'a'\n{url}\nset = 'gate'"), "camera `a`: there is no expert set `gate`"),
            (format!("[[camera]]\nname = 'a'\n{url}\ncrop = '0,0,2.5,1'"), "reaches outside"),
            (format!("[[camera]]\nname = 'a'\n{url}\nfit = 'wide'"), "a fit is"),
            (format!("[[camera]]\nname = 'a'\n{url}\nagree = '1 of 4'"), "more than half"),
            (format!("[[camera]]\nname = 'a'\n{url}\nagree = '3'"), "like `3 of 4`"),
            (format!("[[camera]]\nname = 'a'\n{url}\nmin_score = 2.0"), "min_score"),
            (format!("[[camera]]\nname = 'a'\n{url}\nevery = '1ms'"), "`every` is at least 50 ms"),
            (format!("[[camera]]\nname = 'a'\n{url}\nuser = 'me'"), "goes with `password`"),
            (format!("[[camera]]\nname = 'a'\n{url}\nca = 'none.pem'"), "camera `a`: `ca` goes with https://"),
            ("[[camera]]\nname = 'a'\nurl = 'https://a/'\nca = 'none.pem'".to_owned(), "/nowhere/none.pem"),
            ("[[camera]]\nname = 'a'\nurl = 'https://a/'\nca = '/dev/null'".to_owned(), "/dev/null: the file holds no"),
            (
                "[[camera]]\nname = 'a'\nurl = 'https://a/'\nca = '/dev/zero'".to_owned(),
                "/dev/zero: the file has more than",
            ),
            (
                format!("[[camera]]\nname = 'a'\n{url}\nuser = 'me'\npassword_file = '/dev/zero'"),
                "more than 1048576 bytes",
            ),
            ("[[camera]]\nname = 'a'\nurl = 'ftp://a/'".to_owned(), "http:// or https://"),
            ("[[camera]]\nname = 'a'\nurl = 'http://u:p@a/'".to_owned(), "holds no user"),
            (format!("[[camera]]\nname = 'a'\n{url}\n[[camera]]\nname = 'A'\n{url}"), "two cameras are called `A`"),
            ("[[camera]\nname = 'a'".to_owned(), "line 1: "),
            ("[camera]\nname = 'a'".to_owned(), "line 1: "),
            ("[[cameras]]".to_owned(), "unknown field `cameras`"),
            ("[mqtt]\nurl = 'http://a'".to_owned(), "[mqtt]: `url` begins with mqtt:// or mqtts://"),
            ("[mqtt]\nurl = 'mqtt://u:p@a'".to_owned(), "[mqtt]: `url` holds no user"),
            ("[mqtt]\nurl = 'mqtt://a/topic'".to_owned(), "[mqtt]: `url` is a host and a port"),
            ("[mqtt]\nurl = 'mqtt://a'\ntopics = 'b'".to_owned(), "[mqtt]: unknown field `topics`"),
            ("[mqtt]\nurl = 'mqtt://a'\ntopic = 'a/#'".to_owned(), "[mqtt]: `topic` is one to"),
            ("[mqtt]\nurl = 'mqtt://a'\ndiscovery = true".to_owned(), "[mqtt]: `discovery` is a topic or `false`"),
            ("[mqtt]\nurl = 'mqtt://a'\nca = 'a.pem'".to_owned(), "[mqtt]: `ca` goes with mqtts://"),
            ("[mqtt]\nurl = 'mqtt://a'\nuser = 'me'".to_owned(), "[mqtt]: `user` goes with `password`"),
        ];
        for (text, reason) in cases {
            let said = parsed(&text).unwrap_err();
            assert!(said.contains(reason), "{text}: {said}");
        }
        let secret = parsed("[[camera]]\nname = 'a'\npassword = 'hush\n").unwrap_err();
        assert!(!secret.contains("hush"), "{secret}");
    }

    #[test]
    fn redirects_stay_on_the_host() {
        let address: Address = "http://cam:81/a/b.jpg?x=1".parse().unwrap();
        let to = |location: &str| address.redirected(location).map(|address| address.path);
        assert_eq!(to("/c.jpg").as_deref(), Some("/c.jpg"));
        assert_eq!(to("c.jpg").as_deref(), Some("/a/c.jpg"));
        assert_eq!(to("?y=2").as_deref(), Some("/a/b.jpg?y=2"));
        assert_eq!(to("http://CAM:81/c").as_deref(), Some("/c"));
        for elsewhere in ["http://cam/c", "https://cam:81/c", "http://evil:81/c", "//evil:81/c", "file:///etc/passwd"] {
            assert_eq!(to(elsewhere), None, "{elsewhere}");
        }
    }
}
