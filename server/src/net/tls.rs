//! TLS: a certificate and its key from files, read again when they change, so that renewing them drops no connection.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context, bail};
use sha2::{Digest as _, Sha256};
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_util::sync::CancellationToken;

use crate::sentence::sentence;

/// The certificate that new connections get; clones share it.
#[derive(Clone)]
pub struct Tls {
    files: Arc<Files>,
    /// Of what `current` was made from.
    digest: [u8; 32],
    current: Arc<RwLock<Arc<ServerConfig>>>,
}

impl Tls {
    /// Reads certificate chain and key, both in PEM.
    ///
    /// # Errors
    /// Names the file, never the key.
    pub fn load(certificate: PathBuf, key: PathBuf) -> anyhow::Result<Self> {
        let files = Arc::new(Files { certificate, key });
        let (digest, config) = files.read()?;
        Ok(Self { files, digest, current: Arc::new(RwLock::new(Arc::new(config?))) })
    }

    /// What a new connection is to use.
    pub fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Looks at the files every so often until `stop`. What cannot be used is logged once, and the old certificate
    /// stays: of two files that are replaced one after the other, a first look may see only one.
    pub async fn watch(self, every: Duration, stop: CancellationToken) {
        let (mut seen, mut readable) = (self.digest, true);
        loop {
            tokio::select! {
                () = tokio::time::sleep(every) => {}
                () = stop.cancelled() => return,
            }
            let files = Arc::clone(&self.files);
            let read = tokio::task::spawn_blocking(move || files.read()).await.map_err(anyhow::Error::from);
            match read.flatten().map_err(|error| sentence(&error)) {
                Ok((digest, _)) if digest == seen => readable = true,
                Ok((digest, config)) => {
                    (seen, readable) = (digest, true);
                    match config {
                        Ok(config) => {
                            *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
                            tracing::info!("the certificate has changed; new connections get the new one");
                        }
                        Err(error) => tracing::warn!(
                            error = sentence(&error),
                            "the new certificate cannot be used; the old one stays"
                        ),
                    }
                }
                Err(error) if readable => {
                    readable = false;
                    tracing::warn!(error, "the certificate cannot be read; the old one stays");
                }
                Err(_) => {}
            }
        }
    }
}

struct Files {
    certificate: PathBuf,
    key: PathBuf,
}

impl Files {
    /// A digest of what the files hold (their times say little: a Kubernetes secret changes behind a link), and what
    /// can be made of it.
    fn read(&self) -> anyhow::Result<([u8; 32], anyhow::Result<ServerConfig>)> {
        let read = |path: &PathBuf| std::fs::read(path).with_context(|| path.display().to_string());
        let (certificate, key) = (read(&self.certificate)?, read(&self.key)?);
        let digest = Sha256::new().chain_update(&certificate).chain_update([0]).chain_update(&key).finalize().into();
        Ok((digest, self.config(&certificate, &key)))
    }

    fn config(&self, certificate: &[u8], key: &[u8]) -> anyhow::Result<ServerConfig> {
        let in_certificate = || self.certificate.display().to_string();
        let in_key = || self.key.display().to_string();
        let chain: Vec<_> =
            CertificateDer::pem_slice_iter(certificate).collect::<Result<_, _>>().with_context(in_certificate)?;
        if chain.is_empty() {
            bail!("{}: no certificate in PEM format", self.certificate.display());
        }
        let key = PrivateKeyDer::from_pem_slice(key).with_context(in_key)?;
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .with_context(in_key)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }
}
