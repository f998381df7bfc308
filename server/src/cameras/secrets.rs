//! Who the gateway says that it is, and whom it trusts: users, passwords and certificates from files beside the cameras'.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow, bail, ensure};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::{CertificateError, ClientConfig, RootCertStore};

/// Largest file of cameras, passwords or certificates.
const MOST_FILE_BYTES: u64 = 1 << 20;

/// Who asks a camera or a broker that wants to know.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    pub user: String,
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials")
    }
}

/// User and password as the file has them.
pub struct Secrets {
    pub user: Option<String>,
    pub password: Option<String>,
    pub password_file: Option<PathBuf>,
}

impl Secrets {
    /// # Errors
    /// A sentence that names the keys, never the password.
    pub fn read(self, folder: &Path) -> anyhow::Result<Option<Credentials>> {
        let password = match (self.password, self.password_file) {
            (Some(_), Some(_)) => bail!("`password` and `password_file` go one without the other"),
            (Some(password), None) => Some(password),
            (None, Some(file)) => {
                let bytes = read_beside(folder, &file)?;
                let text = String::from_utf8(bytes).map_err(|_| anyhow!("`password_file` is no text"))?;
                Some(text.trim_end_matches(['\r', '\n']).to_owned())
            }
            (None, None) => None,
        };
        let (user, password) = match (self.user, password) {
            (Some(user), Some(password)) => (user, password),
            (None, None) => return Ok(None),
            _ => bail!("`user` goes with `password` or `password_file`"),
        };
        ensure!(
            ![&user, &password].iter().any(|text| text.contains(char::is_control)),
            "`user` and `password` are one line each"
        );
        Ok(Some(Credentials { user, password }))
    }
}

/// A file that the file in this folder names.
///
/// # Errors
/// A sentence that names the file.
pub fn read_beside(folder: &Path, path: &Path) -> anyhow::Result<Vec<u8>> {
    let path = folder.join(path);
    read_bounded(&path).with_context(|| path.display().to_string())
}

/// What a file holds, as long as that is at most 1 MiB.
///
/// # Errors
/// When it holds more, or cannot be read.
pub fn read_bounded(path: &Path) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MOST_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    ensure!(bytes.len() as u64 <= MOST_FILE_BYTES, "the file has more than {MOST_FILE_BYTES} bytes");
    Ok(bytes)
}

/// The file of certificates that the file in this folder names.
///
/// # Errors
/// A sentence that names the file.
pub fn read_certificates(folder: &Path, path: &Path) -> anyhow::Result<Vec<u8>> {
    let bytes = read_beside(folder, path)?;
    let roots = roots(&bytes).with_context(|| folder.join(path).display().to_string())?;
    ensure!(!roots.is_empty(), "{}: the file holds no certificate in PEM", folder.join(path).display());
    Ok(bytes)
}

fn roots(pem: &[u8]) -> anyhow::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate = certificate.map_err(|_| anyhow!("the file is no PEM"))?;
        roots.add(certificate).map_err(|_| anyhow!("the file holds what is no certificate"))?;
    }
    Ok(roots)
}

/// TLS that trusts the certificates of a PEM file, or those of the system.
///
/// # Errors
/// When there are no certificates to trust.
pub fn trust(ca: Option<&[u8]>) -> anyhow::Result<Arc<ClientConfig>> {
    let roots = match ca {
        Some(pem) => roots(pem)?,
        None => {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            roots
        }
    };
    ensure!(!roots.is_empty(), "there is no certificate to trust; name one in `ca`, or install `ca-certificates`");
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// Why there is no TLS, for whoever looks after the other end.
pub fn no_tls(error: &io::Error) -> String {
    use tokio_rustls::rustls::Error;
    match error.get_ref().and_then(|inner| inner.downcast_ref()) {
        Some(Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature)) => {
            "TLS: nobody who is trusted has signed the certificate; name in `ca` who has".to_owned()
        }
        Some(Error::InvalidMessage(_)) => "TLS: what answers there speaks none".to_owned(),
        _ if error.kind() == io::ErrorKind::UnexpectedEof => "TLS: the other end hangs up".to_owned(),
        _ => format!("TLS: {error}"),
    }
}
