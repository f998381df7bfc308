//! Who may manage: nobody without a key, whichever way the request comes.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use system_tests::server::{Answer, Server, binary, image, wait_until};

/// A server that was given no admin key and wrote the one it made to `key`.
fn serve(key: &Path) -> Server {
    Server::start(["--admin-key-out", key.to_str().unwrap()])
}

/// Every request that changes something, or asks for a change.
const MANAGEMENT: [(&str, &str); 9] = [
    ("PUT", "/sets/new/1"),
    ("DELETE", "/sets/cifar100"),
    ("DELETE", "/sets/cifar100/1"),
    ("POST", "/sets/cifar100/load"),
    ("POST", "/sets/cifar100/unload"),
    ("POST", "/sets/cifar100/pin"),
    ("POST", "/sets/cifar100/unpin"),
    ("POST", "/v2/repository/models/cifar100/load"),
    ("POST", "/v2/repository/models/cifar100/unload"),
];

#[test]
fn a_server_without_a_key_makes_one_for_its_user_alone() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("admin-key");
    let server = serve(&file);
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let key = std::fs::read_to_string(&file).unwrap();
    for (method, path) in MANAGEMENT {
        Answer::of(server.request(method, path).body("x")).assert_refused(401, "unauthorized");
        let wrong = server.request(method, path).bearer_auth("not-the-key-of-this-server").body("x");
        Answer::of(wrong).assert_refused(401, "unauthorized");
    }
    let printed = Command::new(binary()).arg("admin-key").arg("--admin-key-out").arg(&file).output().unwrap();
    assert_eq!(String::from_utf8(printed.stdout).unwrap(), key);
    assert_eq!(Answer::of(server.post("/sets/cifar100/pin").bearer_auth(key.trim())).status, 200);
    drop(server);
    let again = serve(&file);
    Answer::of(again.post("/sets/cifar100/pin").bearer_auth(key.trim())).assert_refused(401, "unauthorized");
}

#[test]
fn the_key_is_written_beside_other_servers_keys_and_the_log_says_where() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = folder.path().to_str().unwrap();
    let variables = [("BVIT_TRUST_LOOPBACK", "false"), ("XDG_RUNTIME_DIR", runtime)];
    let (first, second) =
        (Server::start_with([] as [&str; 0], variables), Server::start_with([] as [&str; 0], variables));
    for server in [&first, &second] {
        let listen = server.address.to_string();
        let printed = Command::new(binary())
            .args(["admin-key", "--listen", &listen])
            .env("XDG_RUNTIME_DIR", runtime)
            .output()
            .unwrap();
        let key = String::from_utf8(printed.stdout).unwrap();
        assert_eq!(Answer::of(server.post("/sets/cifar100/pin").bearer_auth(key.trim())).status, 200, "{listen}");
    }
}

#[test]
fn a_given_key_file_or_variable_without_a_key_refuses_to_start() {
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().join("empty");
    std::fs::write(&empty, "# operators\n\n").unwrap();
    let empty = empty.to_str().unwrap();
    let start = |flags: &[&str], variable: Option<(&str, &str)>| {
        let mut command = Command::new(binary());
        command.args(["--listen", "127.0.0.1:0"]).args(flags).envs(variable).stdout(Stdio::null());
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let cases = [
        (start(&["--admin-key-file", empty], None), empty),
        (start(&["--user-key-file", empty], None), empty),
        (start(&["--admin-key-file", "/no/such/file"], None), "/no/such/file"),
        (start(&[], Some(("BVIT_ADMIN_KEYS", ""))), "BVIT_ADMIN_KEYS"),
        (start(&[], Some(("BVIT_USER_KEYS", " , "))), "BVIT_USER_KEYS"),
        (start(&["--admin-key-out", "/no/such/folder/key"], None), "/no/such/folder/key"),
    ];
    for ((code, said), named) in cases {
        assert_eq!(code, Some(2), "{named}: {said}");
        assert!(said.contains(named) && said.trim().lines().count() == 1, "{said}");
    }
}

/// Killed when dropped.
struct Nginx {
    child: Child,
    port: u16,
    _folder: tempfile::TempDir,
}

impl Drop for Nginx {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A reverse proxy as its beginners' guide sets it up. `None` where it is not installed.
fn nginx(backend: &str) -> Option<Nginx> {
    const BINARY: &str = "/usr/sbin/nginx";
    if !Path::new(BINARY).exists() {
        assert!(std::env::var_os("CI").is_none(), "nginx is missing");
        println!("skipped: nginx is missing");
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let path = folder.path().display();
    let paths =
        ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map(|what| format!("{what}_temp_path {path}/{what};"));
    let configuration = format!(
        "daemon off; master_process off; pid {path}/pid; error_log {path}/error.log; events {{}} http {{ access_log off; {} \
         server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://{backend}; }} }} }}",
        paths.concat()
    );
    let file = folder.path().join("nginx.conf");
    std::fs::write(&file, configuration).unwrap();
    let child =
        Command::new(BINARY).arg("-e").arg(folder.path().join("error.log")).arg("-c").arg(&file).spawn().unwrap();
    let nginx = Nginx { child, port, _folder: folder };
    wait_until("nginx listens", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
    Some(nginx)
}

#[test]
fn behind_a_plain_reverse_proxy_on_this_machine_nobody_is_admin() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("admin-key");
    let server = serve(&file);
    let Some(nginx) = nginx(&server.address.to_string()) else { return };
    let client = reqwest::blocking::Client::new();
    let through = |method: &str, path: &str| {
        client.request(method.parse().unwrap(), format!("http://127.0.0.1:{}{path}", nginx.port))
    };
    for (method, path) in MANAGEMENT {
        Answer::of(through(method, path).body("x")).assert_refused(401, "unauthorized");
    }
    assert_eq!(Answer::of(through("POST", "/classify").body(image("test-00.png"))).status, 200);
    let key = std::fs::read_to_string(&file).unwrap();
    assert_eq!(Answer::of(through("POST", "/sets/cifar100/pin").bearer_auth(key.trim())).status, 200);
}
