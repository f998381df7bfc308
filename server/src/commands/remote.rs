//! A running server as commands reach it: one request a connection, one short answer.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::Value;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, ClientConnection, StreamOwned};

use super::healthcheck::trusting;
use crate::made_key;

/// Most bytes of an answer.
const MOST_ANSWER: u64 = 4 << 20;
/// Longest time without a connection, or without a byte. A server may load a set before it answers.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where a server is, and what proves that one may manage it.
#[derive(Debug)]
pub(super) struct Remote {
    host: String,
    port: u16,
    tls: Option<Arc<ClientConfig>>,
    key: Option<String>,
}

/// The answer to a request.
#[derive(Debug, PartialEq)]
pub(super) struct Answer {
    pub(super) status: u16,
    /// Null when the body is not JSON.
    pub(super) body: Value,
}

impl Answer {
    /// What went wrong, in the words of the server.
    pub(super) fn reason(&self) -> String {
        let said = self.body["error"].as_str().map(str::to_owned);
        said.unwrap_or_else(|| format!("it answers with status {}", self.status))
    }
}

impl Remote {
    /// The server at `url`, `http://HOST:PORT` or `https://HOST:PORT`, whose certificate is then the one in the file
    /// `certificate`. The admin key is the one in `key_file`; without that file, the one that a server on this machine made.
    ///
    /// # Errors
    /// When `url` is no such address, or a file cannot be read.
    pub(super) fn new(url: &str, certificate: Option<&Path>, key_file: Option<&Path>) -> anyhow::Result<Self> {
        let (host, port, is_tls) = address(url)
            .with_context(|| format!("`{url}` is no address of a server, such as http://127.0.0.1:8000"))?;
        let tls = match (is_tls, certificate) {
            (false, _) => None,
            (true, None) => bail!("{url}: name the certificate of the server with --tls-cert"),
            (true, Some(file)) => Some(trusting(file).with_context(|| file.display().to_string())?),
        };
        let key = match key_file {
            Some(file) => Some(given_key(file).with_context(|| file.display().to_string())?),
            None => made_key::read(&made_key::default_path(port)).ok(),
        };
        Ok(Self { host, port, tls, key })
    }

    /// Asks for `path`.
    ///
    /// # Errors
    /// When there is no answer in HTTP.
    pub(super) fn get(&self, path: &str) -> anyhow::Result<Answer> {
        self.send("GET", path, &[])
    }

    /// Sends `bytes` to `path`.
    ///
    /// # Errors
    /// When there is no answer in HTTP.
    pub(super) fn put(&self, path: &str, bytes: &[u8]) -> anyhow::Result<Answer> {
        self.send("PUT", path, bytes)
    }

    fn send(&self, method: &str, path: &str, body: &[u8]) -> anyhow::Result<Answer> {
        let send = || -> anyhow::Result<Answer> {
            let stream = self.connect()?;
            match &self.tls {
                None => self.exchange(stream, method, path, body),
                Some(tls) => {
                    let connection = ClientConnection::new(Arc::clone(tls), ServerName::try_from(self.host.clone())?)?;
                    self.exchange(StreamOwned::new(connection, stream), method, path, body)
                }
            }
        };
        send().with_context(|| format!("the server at {}:{}", self.host, self.port))
    }

    fn connect(&self) -> io::Result<TcpStream> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in (self.host.as_str(), self.port).to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, PATIENCE) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(PATIENCE))?;
                    stream.set_write_timeout(Some(PATIENCE))?;
                    return Ok(stream);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn exchange(&self, mut stream: impl Read + Write, method: &str, path: &str, body: &[u8]) -> anyhow::Result<Answer> {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        let key = self.key.as_ref().map(|key| format!("X-Api-Key: {key}\r\n")).unwrap_or_default();
        let (port, length) = (self.port, body.len());
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {host}:{port}\r\n{key}Content-Length: {length}\r\nConnection: close\r\n\r\n"
        );
        // A server that refuses a request may stop reading it; its answer says why.
        let sent =
            stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body)).and_then(|()| stream.flush());
        let mut answer = Vec::new();
        let read = stream.take(MOST_ANSWER).read_to_end(&mut answer);
        match parse(&answer) {
            Some(answer) => Ok(answer),
            None => {
                sent.and(read)?;
                bail!("it does not answer in HTTP")
            }
        }
    }
}

/// Host, port, and whether it speaks TLS.
fn address(url: &str) -> Option<(String, u16, bool)> {
    let (scheme, rest) = url.split_once("://")?;
    let is_tls = match scheme {
        "http" => false,
        "https" => true,
        _ => return None,
    };
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port.parse().ok()?),
        _ => (authority, if is_tls { 443 } else { 80 }),
    };
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let host = bare.unwrap_or(host);
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte) || (bare.is_some() && byte == b':');
    (!host.is_empty() && host.bytes().all(is_name)).then(|| (host.to_owned(), port, is_tls))
}

/// The first key of a file with one `NAME:KEY` or `KEY` a line.
fn given_key(file: &Path) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(file)?;
    let line = text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#'));
    let line = line.context("the file holds no key")?;
    let key = line.split_once(':').map_or(line, |(_, key)| key).trim();
    if !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        bail!("the first key of the file is no text of ASCII without spaces");
    }
    Ok(key.to_owned())
}

fn parse(answer: &[u8]) -> Option<Answer> {
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&answer[..end]).ok()?;
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()?;
    let body = serde_json::from_slice(&answer[end + 4..]).unwrap_or(Value::Null);
    Some(Answer { status, body })
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn an_address_names_host_and_port() {
        let read = |url: &str| address(url);
        assert_eq!(read("http://127.0.0.1:8000"), Some(("127.0.0.1".to_owned(), 8000, false)));
        assert_eq!(read("https://gateway.example/"), Some(("gateway.example".to_owned(), 443, true)));
        assert_eq!(read("http://[::1]:8000/"), Some(("::1".to_owned(), 8000, false)));
        assert_eq!(read("http://[::1]"), Some(("::1".to_owned(), 80, false)));
        for url in [
            "",
            "127.0.0.1:8000",
            "ftp://a",
            "http://",
            "http://a:b",
            "http://a:99999",
            "http://a/b",
            "http://a b",
            "http://a:1:2",
        ] {
            assert_eq!(read(url), None, "{url}");
        }
        assert!(Remote::new("https://a", None, None).unwrap_err().to_string().contains("--tls-cert"));
    }

    #[test]
    fn a_file_is_sent_with_the_key_and_a_refusal_is_said_in_the_words_of_the_server() {
        let folder = tempfile::tempdir().unwrap();
        let key = folder.path().join("keys");
        std::fs::write(&key, "# mine\nalice:secret\n").unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut got = vec![0; 4096];
            let mut length = 0;
            while !got[..length].ends_with(b"bytes of a set") {
                length += stream.read(&mut got[length..]).unwrap();
            }
            stream.write_all(b"HTTP/1.1 409 Conflict\r\nX: y\r\n\r\n{\"error\": \"it is pinned\"}").unwrap();
            String::from_utf8_lossy(&got[..length]).into_owned()
        });
        let remote = Remote::new(&url, None, Some(&key)).unwrap();
        let answer = remote.put("/sets/a/1", b"bytes of a set").unwrap();
        assert_eq!((answer.status, &*answer.reason()), (409, "it is pinned"));
        let got = server.join().unwrap();
        assert!(got.starts_with("PUT /sets/a/1 HTTP/1.1\r\n"), "{got}");
        assert!(got.contains("X-Api-Key: secret\r\n") && got.contains("Content-Length: 14\r\n"), "{got}");
        assert!(remote.get("/sets").is_err(), "nobody listens any more");
        assert_eq!(parse(b"SSH-2.0-OpenSSH"), None);
        std::fs::write(&key, "\n").unwrap();
        assert!(Remote::new(&url, None, Some(&key)).is_err());
    }
}
