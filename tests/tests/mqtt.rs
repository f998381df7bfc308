//! A real broker hears what cameras show, is killed and comes back, and sends pictures to classify.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use rumqttc::{Client, Event, MqttOptions, Packet, PublishOptions, QoS};
use serde_json::{Value, json};
use system_tests::python;
use system_tests::server::{image, wait_until};
use system_tests::snapshots::{CameraFile, Snapshots, camera};
use tempfile::TempDir;

/// Mosquitto, killed when dropped.
struct Broker {
    child: Child,
    port: u16,
    folder: TempDir,
}

impl Broker {
    /// With these lines of its configuration; `None` where Mosquitto is not installed.
    fn start(lines: &str) -> Option<Self> {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Self::start_in(tempfile::tempdir().unwrap(), port, lines)
    }

    fn start_in(folder: TempDir, port: u16, lines: &str) -> Option<Self> {
        const BINARY: &str = "/usr/sbin/mosquitto";
        if !Path::new(BINARY).exists() {
            assert!(std::env::var_os("CI").is_none(), "mosquitto is missing");
            println!("skipped: mosquitto is missing");
            return None;
        }
        let file = folder.path().join("mosquitto.conf");
        // Nothing is written down, so that a broker that starts anew knows nothing.
        std::fs::write(&file, format!("user root\npersistence false\nlistener {port} 127.0.0.1\n{lines}\n")).unwrap();
        let child = Command::new(BINARY).arg("-c").arg(&file).stderr(Stdio::null()).spawn().unwrap();
        let broker = Self { child, port, folder };
        wait_until("the broker listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        Some(broker)
    }

    fn open() -> Option<Self> {
        Self::start("allow_anonymous true")
    }

    /// Kills it; what is left is enough to start it again.
    fn kill(mut self) -> (TempDir, u16) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let folder = std::mem::replace(&mut self.folder, tempfile::tempdir().unwrap());
        (folder, self.port)
    }

    /// The table of a camera file that names it.
    fn table(&self, more: &str) -> String {
        format!("[mqtt]\nurl = 'mqtt://127.0.0.1:{}'\n{more}\n", self.port)
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

struct Message {
    topic: String,
    payload: String,
    is_kept: bool,
}

/// A client that hears everything.
struct Listener {
    client: Client,
    messages: Arc<Mutex<Vec<Message>>>,
}

impl Listener {
    fn connect(broker: &Broker, name: &str) -> Self {
        let mut options = MqttOptions::new(name, ("127.0.0.1", broker.port));
        options.set_max_packet_size(32 << 20, 32 << 20);
        let (client, mut connection) = Client::builder(options).capacity(64).build();
        client.subscribe("#", QoS::AtLeastOnce).unwrap();
        let messages = Arc::<Mutex<Vec<Message>>>::default();
        let heard = Arc::clone(&messages);
        std::thread::spawn(move || {
            for event in connection.iter().map_while(Result::ok) {
                if let Event::Incoming(Packet::Publish(message)) = event {
                    heard.lock().unwrap().push(Message {
                        topic: String::from_utf8(message.topic.to_vec()).unwrap(),
                        payload: String::from_utf8_lossy(&message.payload).into_owned(),
                        is_kept: message.retain,
                    });
                }
            }
        });
        Self { client, messages }
    }

    /// What was said last on a topic.
    fn last(&self, topic: &str) -> Option<String> {
        let messages = self.messages.lock().unwrap();
        messages.iter().rev().find(|message| message.topic == topic).map(|message| message.payload.clone())
    }

    fn wait_for(&self, topic: &str, payload: &str) {
        wait_until(&format!("{topic} is {payload}"), || self.last(topic).as_deref() == Some(payload));
    }

    /// Topics and payloads that the broker had kept for this client.
    fn kept(&self) -> Vec<(String, String)> {
        let messages = self.messages.lock().unwrap();
        let kept = messages.iter().filter(|message| message.is_kept);
        kept.map(|message| (message.topic.clone(), message.payload.clone())).collect()
    }

    fn count(&self, topic: &str) -> usize {
        self.messages.lock().unwrap().iter().filter(|message| message.topic == topic).count()
    }

    fn send(&self, topic: &str, payload: &[u8]) {
        self.client.publish(topic, payload.to_vec(), PublishOptions::at_least_once()).unwrap();
    }

    /// The answer to a picture for a set.
    fn classify(&self, set: &str, picture: &[u8]) -> Value {
        let topic = format!("butterflyvit/answer/{set}");
        let before = self.count(&topic);
        self.send(&format!("butterflyvit/classify/{set}"), picture);
        wait_until("an answer", || self.count(&topic) > before);
        serde_json::from_str(&self.last(&topic).unwrap()).unwrap()
    }
}

const STATE: &str = "butterflyvit/camera/gate/state";
const STATUS: &str = "butterflyvit/status";
const DISCOVERED: &str = "homeassistant/sensor/butterflyvit/gate_state/config";

#[test]
fn states_are_kept_and_a_killed_gateway_leaves_its_will() {
    let Some(broker) = Broker::open() else { return };
    let snapshots = Snapshots::start();
    snapshots.show(image("test-00.png"));
    let file = CameraFile::of(&(broker.table("") + &camera("gate", &snapshots.url("/now"), "frozen = 0")));
    let server = file.serve();
    let label = server.classify(&image("test-00.png")).label();
    let listener = Listener::connect(&broker, "listener");
    listener.wait_for(STATE, &label);
    listener.wait_for("butterflyvit/camera/gate/availability", "online");
    listener.wait_for("butterflyvit/camera/gate/reason", "None");
    listener.wait_for(STATUS, "online");
    let attributes: Value =
        serde_json::from_str(&listener.last("butterflyvit/camera/gate/attributes").unwrap()).unwrap();
    assert_eq!((&attributes["condition"], &attributes["set"]), (&json!("ok"), &json!("cifar100")));
    assert!(attributes["last_seen"].as_str().unwrap().ends_with("+00:00"), "{attributes}");
    assert_eq!(server.metric(&format!("bvit_mqtt_connected{{broker=\"127.0.0.1:{}\"}}", broker.port)), 1.0);
    assert_eq!(server.get("/cameras").json()["mqtt"]["connected"], true);

    let late = Listener::connect(&broker, "late");
    late.wait_for(STATE, &label);
    wait_until("all that is kept", || late.kept().len() >= 11);
    assert!(late.kept().iter().any(|(topic, payload)| topic == STATE && *payload == label));

    snapshots.show(image("test-03.png"));
    let other = server.classify(&image("test-03.png")).label();
    assert_ne!(label, other);
    listener.wait_for(STATE, &other);
    snapshots.show(b"rubbish".to_vec());
    listener.wait_for("butterflyvit/camera/gate/availability", "offline");
    listener.wait_for(STATE, "None");

    // Dropping a server kills it, and only the broker can say that it has gone.
    drop(server);
    listener.wait_for(STATUS, "offline");
    snapshots.show(image("test-00.png"));
    let mut server = file.serve();
    listener.wait_for(STATUS, "online");
    listener.wait_for(STATE, &label);
    server.signal("TERM");
    assert!(server.wait().success());
    listener.wait_for(STATUS, "offline");
}

#[test]
fn a_broker_that_was_killed_is_told_everything_again() {
    let Some(broker) = Broker::open() else { return };
    let snapshots = Snapshots::start();
    snapshots.show(image("test-01.png"));
    let file = CameraFile::of(&(broker.table("") + &camera("gate", &snapshots.url("/now"), "frozen = 0")));
    let server = file.serve();
    let label = server.classify(&image("test-01.png")).label();
    Listener::connect(&broker, "before").wait_for(STATE, &label);
    let (folder, port) = broker.kill();
    server.wait_for_log("no MQTT; trying again");
    let frames = || server.get("/cameras/gate").json()["frames"].as_u64().unwrap();
    let before = frames();
    wait_until("cameras do not wait for the broker", || frames() > before + 10);
    let view = server.get("/cameras").json()["mqtt"].clone();
    assert!(view["connected"] == false && view["error"].is_string(), "{view}");
    let broker = Broker::start_in(folder, port, "allow_anonymous true").unwrap();
    let listener = Listener::connect(&broker, "after");
    listener.wait_for(STATUS, "online");
    listener.wait_for(STATE, &label);
    wait_until("discovery", || listener.last(DISCOVERED).is_some());
}

#[test]
fn home_assistant_is_told_what_it_documents_and_of_cameras_that_go() {
    let Some(broker) = Broker::open() else { return };
    let snapshots = Snapshots::start();
    snapshots.show(image("test-02.png"));
    let url = snapshots.url("/now");
    let (gate, many) = (camera("gate", &url, "frozen = 0"), camera("many.labels", &url, "set = 'imagenet'"));
    let file = CameraFile::of(&(broker.table("") + &gate + &many));
    let server = file.serve();
    let listener = Listener::connect(&broker, "homeassistant");
    wait_until("discovery", || listener.last(DISCOVERED).is_some());
    let is_discovery = |topic: &str| topic.starts_with("homeassistant/") && topic.ends_with("/config");
    let configs = |listener: &Listener| {
        let messages = listener.messages.lock().unwrap();
        let configs = messages.iter().filter(|message| is_discovery(&message.topic) && !message.payload.is_empty());
        configs.map(|message| (message.topic.clone(), message.payload.clone())).collect::<Vec<_>>()
    };
    wait_until("both cameras and the gateway", || configs(&listener).len() >= 9);
    for (topic, payload) in configs(&listener) {
        let levels: Vec<&str> = topic.split('/').collect();
        let is_plain = |level: &&str| level.chars().all(|sign| sign.is_ascii_alphanumeric() || "-_".contains(sign));
        assert!(levels.len() == 5 && levels.iter().all(is_plain), "{topic}");
        let payload: Value = serde_json::from_str(&payload).unwrap();
        // What is announced is also said.
        for key in ["state_topic", "json_attributes_topic"] {
            if let Some(topic) = payload[key].as_str() {
                wait_until(topic, || listener.last(topic).is_some());
            }
        }
    }
    if let Some(mut python) = python::program("python") {
        let lines = configs(&listener).iter().fold(String::new(), |mut lines, (_, payload)| {
            writeln!(lines, "{payload}").unwrap();
            lines
        });
        let mut child = python.arg("home-assistant/validate.py").stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success());
    }

    // Home Assistant starts, and is told again.
    let before = listener.count(DISCOVERED);
    listener.send("homeassistant/status", b"online");
    wait_until("another announcement", || listener.count(DISCOVERED) > before);

    file.write(&(broker.table("") + &gate));
    let gone = "butterflyvit/camera/many.labels/state";
    listener.wait_for(gone, "");
    let kept = |about: &str| {
        let late = Listener::connect(&broker, "late");
        late.wait_for(STATUS, "online");
        late.send("end", b"end");
        late.wait_for("end", "end");
        late.kept().into_iter().filter(|(topic, _)| topic.contains(about)).count()
    };
    wait_until("nothing is kept of it", || kept("many") == 0);
    assert!(kept("gate") >= 9);

    // A camera that leaves the file while the gateway is away is forgotten, too.
    drop(server);
    file.write(&(broker.table("") + &camera("door", &url, "")));
    let _server = file.serve();
    listener.wait_for(STATE, "");
    wait_until("nothing is kept of it", || kept("gate") == 0);
    assert!(kept("door") >= 9);
    // Without a broker in the file nothing stays.
    file.write(&camera("door", &url, ""));
    listener.wait_for("butterflyvit/camera/door/availability", "");
    listener.wait_for(STATUS, "offline");
}

#[test]
fn pictures_are_answered_and_what_is_none_is_refused_with_a_sentence() {
    let Some(broker) = Broker::open() else { return };
    let file = CameraFile::of(&broker.table("discovery = false"));
    let server = file.serve();
    let listener = Listener::connect(&broker, "listener");
    listener.wait_for(STATUS, "online");
    let picture = image("test-00.png");
    let (answer, expected) = (listener.classify("cifar100", &picture), server.classify(&picture).json());
    for key in ["set", "version", "generation", "predictions", "unknown"] {
        assert_eq!(answer[key], expected[key], "{key}");
    }
    listener.send("butterflyvit/classify/cifar100/request-7", &picture);
    let topic = "butterflyvit/answer/cifar100/request-7";
    wait_until("an answer with a word", || listener.last(topic).is_some());
    for (set, payload, reason) in [
        ("nobody", picture.as_slice(), "nobody"),
        ("cifar100", b"no picture", "not an image"),
        ("cifar100", b"", "empty"),
        ("cifar100", &picture[..200], "truncated"),
        ("cifar100", &vec![0; 10 << 20], "4194304"),
    ] {
        let answer = listener.classify(set, payload);
        assert!(answer["error"].as_str().is_some_and(|error| error.contains(reason)), "{reason}: {answer}");
    }
    // Many at once: each is answered, be it with a refusal.
    let before = listener.count("butterflyvit/answer/cifar100");
    for _ in 0..40 {
        listener.send("butterflyvit/classify/cifar100", &picture);
    }
    wait_until("40 answers", || listener.count("butterflyvit/answer/cifar100") == before + 40);
    assert!(listener.messages.lock().unwrap().iter().all(|message| !message.topic.starts_with("homeassistant")));

    // A message that is too large to be read costs the connection, not the gateway.
    listener.send("butterflyvit/classify/cifar100", &vec![0; 17 << 20]);
    let line = server.wait_for_log("no MQTT; trying again");
    assert!(line.contains("more than 16777216 bytes"), "{line}");
    listener.wait_for(STATUS, "offline");
    listener.wait_for(STATUS, "online");
}

#[test]
fn a_broker_that_cannot_be_used_is_named_once() {
    let Some(broker) = Broker::open() else { return };
    let (folder, port) = broker.kill();
    let passwords = folder.path().join("passwords");
    let made = Command::new("mosquitto_passwd").args(["-b", "-c"]).arg(&passwords).args(["gateway", "sesame"]).status();
    assert!(made.unwrap().success());
    let certified = rcgen::generate_simple_self_signed(["broker.example".to_owned()]).unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(path("key.pem"), certified.signing_key.serialize_pem()).unwrap();
    std::fs::write(path("cert.pem"), certified.cert.pem()).unwrap();
    let tls_port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let lines = format!(
        "allow_anonymous false\npassword_file {}\nlistener {tls_port} 127.0.0.1\ncertfile {}\nkeyfile {}",
        passwords.display(),
        path("cert.pem"),
        path("key.pem")
    );
    let certificate = certified.cert.pem();
    let broker = Broker::start_in(folder, port, &lines).unwrap();
    let dead = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    for (table, reason) in [
        (broker.table("user = 'gateway'\npassword_file = 'password'"), "does not accept this user and password"),
        (broker.table(""), "wants a user and a password"),
        (format!("[mqtt]\nurl = 'mqtt://127.0.0.1:{dead}'\n"), "cannot connect"),
        (format!("[mqtt]\nurl = 'mqtts://127.0.0.1:{tls_port}'\nca = 'ca.pem'\n"), "not valid for name"),
    ] {
        let file = CameraFile::of("");
        std::fs::write(file.folder().join("password"), "wrong\n").unwrap();
        std::fs::write(file.folder().join("ca.pem"), &certificate).unwrap();
        file.write(&table);
        let mut server = file.serve();
        let line = server.wait_for_log("no MQTT; trying again");
        assert!(line.contains(reason), "{reason}: {line}");
        server.signal("TERM");
        assert!(server.wait().success());
        assert!(!server.log_to_end().iter().any(|line| line.contains("no MQTT")), "{reason}");
    }
}

#[test]
fn a_broker_with_tls_and_a_password_is_told() {
    let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(path("key.pem"), certified.signing_key.serialize_pem()).unwrap();
    std::fs::write(path("cert.pem"), certified.cert.pem()).unwrap();
    let tls_port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let lines = format!(
        "allow_anonymous true\nlistener {tls_port} 127.0.0.1\ncertfile {}\nkeyfile {}",
        path("cert.pem"),
        path("key.pem")
    );
    let certificate = certified.cert.pem();
    let Some(broker) = Broker::start(&lines) else { return };
    let file = CameraFile::of("");
    std::fs::write(file.folder().join("ca.pem"), certificate).unwrap();
    file.write(&format!("[mqtt]\nurl = 'mqtts://localhost:{tls_port}'\nca = 'ca.pem'\ntopic = 'home/cameras'\n"));
    let server = file.serve();
    server.wait_for_log("connected to the MQTT broker");
    Listener::connect(&broker, "listener").wait_for("home/cameras/status", "online");
    let connected = format!("bvit_mqtt_connected{{broker=\"localhost:{tls_port}\"}}");
    assert_eq!(server.metric(&connected), 1.0);
}
