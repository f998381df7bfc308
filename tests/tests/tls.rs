//! TLS over real sockets, with certificates made here.

use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use system_tests::server::{Connection, Server, binary, image, request_head};
use tempfile::TempDir;

/// A certificate for 127.0.0.1 that signs itself, written where the server looks.
fn write_certificate(folder: &Path) -> CertificateDer<'static> {
    let certified = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    std::fs::write(folder.join("key.pem"), certified.signing_key.serialize_pem()).unwrap();
    std::fs::write(folder.join("cert.pem"), certified.cert.pem()).unwrap();
    certified.cert.der().clone()
}

fn start(folder: &TempDir) -> Server {
    let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (certificate, key) = (file("cert.pem"), file("key.pem"));
    Server::start(["--tls-cert", &certificate, "--tls-key", &key, "--tls-reload", "50ms", "--header-timeout", "60s"])
}

/// A connection that trusts that certificate and no other.
fn connect(server: &Server, trusted: &CertificateDer<'static>) -> Connection<StreamOwned<ClientConnection, TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::from(IpAddr::from(Ipv4Addr::LOCALHOST));
    let client = ClientConnection::new(Arc::new(config), name).unwrap();
    Connection(StreamOwned::new(client, server.connect().0))
}

fn classify(connection: &mut Connection<StreamOwned<ClientConnection, TcpStream>>) -> (u16, String) {
    let picture = image("test-00.png");
    connection.send(&request_head("POST /classify", picture.len())).send(&picture).read_one()
}

fn healthcheck(server: &Server, certificate: Option<&Path>) -> bool {
    let mut command = Command::new(binary());
    command.args(["healthcheck", "--listen", &server.address.to_string()]);
    command.args(certificate.map(|path| format!("--tls-cert={}", path.display())));
    command.output().unwrap().status.success()
}

#[test]
fn requests_travel_over_tls_only() {
    let folder = tempfile::tempdir().unwrap();
    let certificate = write_certificate(folder.path());
    let server = start(&folder);
    let (status, text) = classify(&mut connect(&server, &certificate));
    assert_eq!(status, 200, "{text}");
    assert!(text.contains("strict-transport-security: max-age="), "{text}");
    let (status, text) = server.connect().send(b"GET /health HTTP/1.1\r\nHost: test\r\n\r\n").read();
    assert_eq!(status, 0, "plain HTTP gets no answer: {text}");
    assert!(healthcheck(&server, Some(&folder.path().join("cert.pem"))));
    assert!(!healthcheck(&server, None));
    let other = tempfile::tempdir().unwrap();
    write_certificate(other.path());
    assert!(!healthcheck(&server, Some(&other.path().join("cert.pem"))), "another certificate is not trusted");
}

#[test]
fn a_new_certificate_is_taken_up_without_dropping_connections() {
    let folder = tempfile::tempdir().unwrap();
    let first = write_certificate(folder.path());
    let server = start(&folder);
    let mut before = connect(&server, &first);
    assert_eq!(classify(&mut before).0, 200);

    let second = write_certificate(folder.path());
    server.wait_for_log("the certificate has changed");
    let mut after = connect(&server, &second);
    assert_eq!(classify(&mut after).0, 200);
    assert_eq!(classify(&mut connect(&server, &first)).0, 0, "new connections do not get the old certificate");

    std::fs::write(folder.path().join("key.pem"), "no key").unwrap();
    let line = server.wait_for_log("the old one stays");
    assert!(line.contains("key.pem") && !line.contains("no key"), "{line}");
    assert_eq!(classify(&mut connect(&server, &second)).0, 200);
    assert_eq!(classify(&mut before).0, 200, "the first connection is still open");
}

#[test]
fn a_key_that_is_not_the_certificates_stops_the_start() {
    let folder = tempfile::tempdir().unwrap();
    write_certificate(folder.path());
    let other = tempfile::tempdir().unwrap();
    write_certificate(other.path());
    let output = Command::new(binary())
        .args(["--listen", "127.0.0.1:0", "--tls-cert"])
        .arg(folder.path().join("cert.pem"))
        .arg("--tls-key")
        .arg(other.path().join("key.pem"))
        .output()
        .unwrap();
    let reason = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{reason}");
    assert!(reason.contains("key.pem") && reason.lines().count() == 1, "{reason}");
}
