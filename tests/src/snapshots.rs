//! Cameras that answer, hang and lie, and files that name them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use crate::server::Server;

/// Snapshots by path, as cameras answer them.
#[derive(Debug)]
pub struct Snapshots {
    address: SocketAddr,
    /// The picture that `/now` answers.
    now: Arc<Mutex<Vec<u8>>>,
}

impl Snapshots {
    /// Listens on a free port.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a socket, file or program of this test");
        let snapshots = Self {
            address: listener.local_addr().expect("a socket, file or program of this test"),
            now: Arc::default(),
        };
        let now = Arc::clone(&snapshots.now);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let now = Arc::clone(&now);
                std::thread::spawn(move || answer(stream, &now));
            }
        });
        snapshots
    }

    /// What `/now` answers from now on.
    pub fn show(&self, picture: Vec<u8>) {
        *self.now.lock().expect("a socket, file or program of this test") = picture;
    }

    /// The address of a path.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }
}

fn answer(mut stream: TcpStream, now: &Mutex<Vec<u8>>) {
    let lines: Vec<String> = BufReader::new(stream.try_clone().expect("a socket, file or program of this test"))
        .lines()
        .map_while(Result::ok)
        .take_while(|line| !line.is_empty())
        .collect();
    let Some(path) = lines.first().and_then(|line| line.split(' ').nth(1)) else { return };
    let authorization = lines.iter().find_map(|line| line.strip_prefix("authorization: "));
    let picture = || now.lock().expect("a socket, file or program of this test").clone();
    let ok = |kind: &str, body: &[u8]| {
        let head = format!("HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n", body.len());
        [head.as_bytes(), body].concat()
    };
    let other =
        |status: &str, header: &str| format!("HTTP/1.1 {status}\r\n{header}\r\nContent-Length: 0\r\n\r\n").into_bytes();
    let bytes = match path {
        "/now" => ok("image/png", &picture()),
        "/page" => ok("text/html", b"<html>log in</html>"),
        "/rubbish" => ok("image/jpeg", b"no picture at all"),
        "/empty" => ok("image/jpeg", b""),
        "/stream" => ok("multipart/x-mixed-replace; boundary=x", b"--x"),
        "/half" => ok("image/png", &picture())[..200].to_vec(),
        "/huge" => {
            b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n".iter().copied().chain(vec![0; 9 << 20]).collect()
        }
        "/announced" => b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n".to_vec(),
        "/gone" => other("404 Not Found", "X-A: b"),
        "/moved" => other("302 Found", "Location: /now"),
        "/elsewhere" => other("302 Found", "Location: http://127.0.0.2:1/now"),
        "/round" => other("302 Found", "Location: /round"),
        "/babble" => b"SSH-2.0-OpenSSH_9.2\r\n".to_vec(),
        "/basic" if authorization == Some("Basic dmlld2VyOnNlc2FtZQ==") => ok("image/png", &picture()),
        "/basic" => other("401 Unauthorized", "WWW-Authenticate: Basic realm=\"cam\""),
        "/digest" if authorization.is_some_and(is_right) => ok("image/png", &picture()),
        "/digest" => other("401 Unauthorized", "WWW-Authenticate: Digest realm=\"cam\", nonce=\"n\", qop=\"auth\""),
        _ => {
            // Hangs until the other side has gone.
            drop(stream.read(&mut [0; 1]));
            return;
        }
    };
    drop(stream.write_all(&bytes));
}

/// Whether a digest is that of `viewer`, `sesame`: MD5 by coreutils.
fn is_right(header: &str) -> bool {
    let field = |name: &str| {
        let (_, rest) = header.split_once(&format!("{name}="))?;
        rest.trim_start_matches('"').split(['"', ',']).next().map(str::to_owned)
    };
    let md5 = |text: String| {
        let output = Command::new("sh")
            .args(["-c", &format!("printf %s '{text}' | md5sum")])
            .output()
            .expect("a socket, file or program of this test");
        String::from_utf8(output.stdout).expect("a socket, file or program of this test")[..32].to_owned()
    };
    let (Some(count), Some(cnonce), Some(response)) = (field("nc"), field(" cnonce"), field(" response")) else {
        return false;
    };
    let (who, what) = (md5("viewer:cam:sesame".into()), md5("GET:/digest".into()));
    md5(format!("{who}:n:{count}:{cnonce}:auth:{what}")) == response
}

/// A file of cameras.
#[derive(Debug)]
pub struct CameraFile {
    folder: tempfile::TempDir,
}

impl CameraFile {
    /// One with this text, in a folder of its own.
    pub fn of(text: &str) -> Self {
        let file = Self { folder: tempfile::tempdir().expect("a socket, file or program of this test") };
        file.write(text);
        file
    }

    /// Replaces the text of the file.
    pub fn write(&self, text: &str) {
        std::fs::write(self.path(), text).expect("a socket, file or program of this test");
    }

    /// The folder that paths in the file start from.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Where the file is.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("cameras.toml")
    }

    /// Starts a server with it.
    pub fn serve(&self) -> Server {
        Server::start(["--cameras", self.path().to_str().expect("a socket, file or program of this test")])
    }
}

/// A table of the file: a camera that is asked often.
pub fn camera(name: &str, url: &str, more: &str) -> String {
    format!("[[camera]]\nname = '{name}'\nurl = '{url}'\nevery = '50ms'\ntimeout = '2s'\nagree = '2 of 3'\n{more}\n")
}
