//! The real `butterflyvit` as a child process on a free port, and the files tests send to it.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use model_core::image::RgbImage;
use reqwest::blocking::{Client, RequestBuilder, Response};
use serde_json::Value;

/// How long anything may take before the test fails instead of hanging; no statement about speed.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace").to_path_buf()
}

/// The server that cargo built together with the running test.
pub fn binary() -> PathBuf {
    let test = std::env::current_exe().expect("the path of the running test");
    let profile = test.ancestors().nth(2).expect("cargo puts tests into the folder deps");
    let path = profile.join("butterflyvit-under-test");
    assert!(path.exists(), "{} is missing", path.display());
    path
}

/// The bytes of a file of `tests/images`.
pub fn image(name: &str) -> Vec<u8> {
    std::fs::read(root().join("tests/images").join(name)).expect("a committed test image")
}

/// An image as a PNG.
pub fn png(image: &RgbImage) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, image.width(), image.height());
    encoder.set_color(png::ColorType::Rgb);
    let mut writer = encoder.write_header().expect("a header in memory");
    writer.write_image_data(image.as_raw()).expect("all of the image");
    writer.finish().expect("an end in memory");
    bytes
}

/// The names of the committed test images.
pub fn image_names() -> Vec<String> {
    let labels: Value = serde_json::from_slice(&image("labels.json")).expect("JSON");
    labels.as_object().expect("an object by name").keys().cloned().collect()
}

/// What a test does with the output of its server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reader {
    /// Reads it line by line.
    Reads,
    /// Leaves the pipes open and reads nothing.
    StandsStill,
    /// Closes the pipes.
    Closes,
}

/// A running server, killed when dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    pub address: SocketAddr,
    /// Behind a lock so that threads of a test can share the server.
    lines: Mutex<Receiver<String>>,
    /// What happens to the output, a [`Reader`].
    reader: Arc<AtomicU8>,
    client: Client,
}

impl Server {
    /// Starts `butterflyvit` with more flags and waits until it is ready. The default set is `cifar100` unless the flags
    /// say otherwise: the committed images are its images, and it answers in a fraction of the time.
    pub fn start<S: AsRef<OsStr>>(flags: impl IntoIterator<Item = S>) -> Self {
        Self::start_with(flags, [])
    }

    /// As [`Server::start`], with more environment variables.
    pub fn start_with<S: AsRef<OsStr>, const N: usize>(
        flags: impl IntoIterator<Item = S>,
        variables: [(&str, &str); N],
    ) -> Self {
        let flags: Vec<OsString> = flags.into_iter().map(|flag| flag.as_ref().to_owned()).collect();
        let names = |flag: &OsString| flag.to_string_lossy().starts_with("--model-store") || flag == "--default-set";
        let default_set = (!flags.iter().any(names)).then_some("cifar100");
        Self::spawn(flags, &variables, default_set)
    }

    /// The server as a newcomer starts it, with the default set that it has by itself.
    pub fn as_shipped() -> Self {
        Self::spawn(Vec::new(), &[], None)
    }

    fn spawn(flags: Vec<OsString>, variables: &[(&str, &str)], default_set: Option<&str>) -> Self {
        // Most tests manage sets and are about something else than keys.
        let with_keys = flags.iter().any(|flag| flag.to_string_lossy().starts_with("--admin-key"))
            || variables.iter().any(|(name, _)| *name == "BVIT_ADMIN_KEYS");
        let mut child = Command::new(binary())
            .args(["--listen", "127.0.0.1:0"])
            .args(flags)
            .envs(default_set.map(|set| ("BVIT_DEFAULT_SET", set)))
            .envs((!with_keys).then_some(("BVIT_TRUST_LOOPBACK", "true")))
            .envs(variables.iter().copied())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the server starts");
        let (sender, lines) = channel();
        let reader = Arc::new(AtomicU8::new(Reader::Reads as u8));
        forward(child.stdout.take().expect("piped"), sender.clone(), Arc::clone(&reader));
        forward(child.stderr.take().expect("piped"), sender, Arc::clone(&reader));
        let client = Client::builder().timeout(PATIENCE).build().expect("a client");
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        // Made before anything can fail, so that dropping it ends the process.
        let mut server = Self { child, address, lines: Mutex::new(lines), reader, client };
        let line = server.wait_for_log("listening address=");
        let (_, text) = line.split_once("address=").expect("just found");
        server.address = text.trim().parse().expect("an address");
        server.wait_for_log(" ready ");
        server
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The URL of a path.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub fn get(&self, path: &str) -> Answer {
        Answer::of(self.client.get(self.url(path)))
    }

    /// A POST to be completed with a body.
    pub fn post(&self, path: &str) -> RequestBuilder {
        self.client.post(self.url(path))
    }

    /// Any request to be completed.
    pub fn request(&self, method: &str, path: &str) -> RequestBuilder {
        let method = method.parse().expect("an HTTP method");
        self.client.request(method, self.url(path))
    }

    /// The value of one series of `/metrics`.
    pub fn metric(&self, series: &str) -> f64 {
        let text = self.get("/metrics").text;
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("{series} is missing: {text}"))
    }

    /// POSTs bytes to `/classify` without a content type, as `curl -T` does.
    pub fn classify(&self, body: &[u8]) -> Answer {
        Answer::of(self.post("/classify").body(body.to_vec()))
    }

    /// A bare connection, for requests no client library would send.
    pub fn connect(&self) -> Connection {
        let stream = TcpStream::connect(self.address).expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        Connection(stream)
    }

    /// Sends a signal such as `TERM`.
    pub fn signal(&self, name: &str) {
        let status = Command::new("sh").args(["-c", &format!("kill -{name} {}", self.pid())]).status();
        assert!(status.expect("sh runs").success());
    }

    /// Waits for the process to end.
    pub fn wait(&mut self) -> ExitStatus {
        let start = std::time::Instant::now();
        while start.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait().expect("a child process") {
                return status;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the server did not end");
    }

    /// What has been logged and not yet been waited for.
    pub fn log_so_far(&self) -> Vec<String> {
        self.lines.lock().expect("no test thread panicked while it read").try_iter().collect()
    }

    /// What has been logged and not yet been waited for, up to the end of the process.
    pub fn log_to_end(&self) -> Vec<String> {
        self.lines.lock().expect("no test thread panicked while it read").iter().collect()
    }

    /// Decides what happens to what the server prints, from the next line on.
    pub fn set_reader(&self, reader: Reader) {
        self.reader.store(reader as u8, Ordering::Relaxed);
    }

    /// The process's resident memory in bytes, now and at its peak.
    pub fn memory(&self) -> (usize, usize) {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("a running process");
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a field of every process");
            line.split_whitespace().next().and_then(|kib| kib.parse::<usize>().ok()).expect("kB") * 1024
        };
        (field("VmRSS:"), field("VmHWM:"))
    }

    /// Waits for a line of the log that contains `text`.
    pub fn wait_for_log(&self, text: &str) -> String {
        let lines = self.lines.lock().expect("no test thread panicked while it read");
        loop {
            let line = lines.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("no line with {text:?} in the log"));
            if line.contains(text) {
                return line;
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Reads to the end, unless a test wants something else.
fn forward(output: impl Read + Send + 'static, lines: Sender<String>, reader: Arc<AtomicU8>) {
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            while reader.load(Ordering::Relaxed) == Reader::StandsStill as u8 {
                std::thread::sleep(Duration::from_millis(5));
            }
            if reader.load(Ordering::Relaxed) == Reader::Closes as u8 {
                return;
            }
            drop(lines.send(line));
        }
    });
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    headers: reqwest::header::HeaderMap,
    pub text: String,
}

impl Answer {
    pub fn of(request: RequestBuilder) -> Self {
        Self::read(request.send().expect("an answer"))
    }

    fn read(response: Response) -> Self {
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Self { status, headers, text: response.text().expect("a body") }
    }

    /// A header as text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    /// The first prediction's label.
    pub fn label(&self) -> String {
        let label = self.json()["predictions"][0]["label"].as_str().map(ToOwned::to_owned);
        label.unwrap_or_else(|| panic!("{}: {}", self.status, self.text))
    }

    /// Asserts a refusal: its status, its code, and the flat body every refusal has.
    pub fn assert_refused(&self, status: u16, error_type: &str) {
        let body = self.json();
        assert_eq!((self.status, body["error_type"].as_str()), (status, Some(error_type)), "{}", self.text);
        assert!(body["error"].as_str().is_some_and(|sentence| sentence.len() > 8), "{}", self.text);
        assert_eq!(self.header("retry-after").is_some(), matches!(status, 429 | 503), "{:?}", self.headers);
    }
}

/// A bare connection, plain or wrapped.
#[derive(Debug)]
pub struct Connection<S = TcpStream>(pub S);

impl<S: Read + Write> Connection<S> {
    /// Sends bytes. A connection that the server has closed is no error here: its answer tells.
    pub fn send(&mut self, bytes: &[u8]) -> &mut Self {
        drop(self.0.write_all(bytes));
        self
    }

    /// Everything until the server closes the connection: status (0 for none) and the whole text.
    pub fn read(&mut self) -> (u16, String) {
        let mut bytes = Vec::new();
        drop(self.0.read_to_end(&mut bytes));
        status_and_text(&bytes)
    }

    /// One answer with a `Content-Length`, leaving the connection open: status (0 when the server closed it)
    /// and the whole text.
    pub fn read_one(&mut self) -> (u16, String) {
        let (mut bytes, mut byte) = (Vec::new(), [0]);
        while !bytes.ends_with(b"\r\n\r\n") && self.0.read(&mut byte).is_ok_and(|count| count == 1) {
            bytes.push(byte[0]);
        }
        let head = String::from_utf8_lossy(&bytes).to_ascii_lowercase();
        let length = head.split_once("content-length: ").and_then(|(_, rest)| rest.lines().next()?.parse().ok());
        let mut body = vec![0; length.unwrap_or(0)];
        drop(self.0.read_exact(&mut body));
        bytes.extend(body);
        status_and_text(&bytes)
    }
}

fn status_and_text(bytes: &[u8]) -> (u16, String) {
    let text = String::from_utf8_lossy(bytes).into_owned();
    let status = text.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    (status, text)
}

/// Waits for something that the server does in its own time.
pub fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let start = std::time::Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "{what}: not so");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The head of a request whose body has so many bytes, on a connection that stays open.
pub fn request_head(method_and_path: &str, length: usize) -> Vec<u8> {
    format!("{method_and_path} HTTP/1.1\r\nHost: test\r\nContent-Length: {length}\r\n\r\n").into()
}
