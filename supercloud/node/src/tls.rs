//! TLS 1.3 between nodes. Each end accepts certificates of the cluster's CA only, and none
//! that was removed; a node that joins accepts the one whose CA its token names.

use std::collections::HashSet;
use std::sync::{Arc, PoisonError, RwLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore,
    ServerConfig, SignatureScheme,
};
use supercloud_api::Error;

use crate::pki::{self, Identity, sum};

/// SHA-256 of certificates that are not accepted any more.
#[derive(Clone, Debug, Default)]
pub struct Removed(Arc<RwLock<HashSet<String>>>);

impl Removed {
    /// From now on it is these.
    pub fn set(&self, all: impl IntoIterator<Item = String>) {
        let mut removed = self.0.write().unwrap_or_else(PoisonError::into_inner);
        *removed = all.into_iter().collect();
    }

    /// Whether one is among them, by its SHA-256.
    #[must_use]
    pub fn has(&self, sum: &str) -> bool {
        let removed = self.0.read().unwrap_or_else(PoisonError::into_inner);
        removed.contains(sum)
    }

    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        if self.has(&sum(certificate)) {
            return Err(CertificateError::Revoked.into());
        }
        Ok(())
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::failed(format!("TLS: {error}"))
}

fn roots(ca: CertificateDer<'static>) -> Result<Arc<RootCertStore>, Error> {
    let mut roots = RootCertStore::empty();
    roots.add(ca).map_err(failed)?;
    Ok(Arc::new(roots))
}

#[derive(Debug)]
struct Clients {
    inner: Arc<dyn ClientCertVerifier>,
    removed: Removed,
}

impl ClientCertVerifier for Clients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn client_auth_mandatory(&self) -> bool {
        // Who joins has none yet; the router lets such a one do nothing else.
        false
    }

    fn verify_client_cert(
        &self,
        end: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.removed.check(end)?;
        self.inner.verify_client_cert(end, between, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 only".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

#[derive(Debug)]
struct Servers {
    inner: Arc<WebPkiServerVerifier>,
    removed: Removed,
}

impl ServerCertVerifier for Servers {
    fn verify_server_cert(
        &self,
        end: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.removed.check(end)?;
        self.inner.verify_server_cert(end, between, name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 only".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// The end that listens.
///
/// # Errors
/// The identity is none.
pub fn server(identity: &Identity, removed: &Removed) -> Result<Arc<ServerConfig>, Error> {
    let provider = provider();
    let inner =
        WebPkiClientVerifier::builder_with_provider(roots(identity.ca()?)?, Arc::clone(&provider))
            .build()
            .map_err(failed)?;
    let clients = Clients {
        inner,
        removed: removed.clone(),
    };
    // Who joins checks the CA's certificate, so it is sent as well.
    let chain = vec![identity.certificate()?, identity.ca()?];
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(failed)?
        .with_client_cert_verifier(Arc::new(clients))
        .with_single_cert(chain, identity.key()?)
        .map_err(failed)?;
    // A session that is resumed is not verified again: a node that was removed would go on.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(Arc::new(config))
}

/// The end that asks another node.
///
/// # Errors
/// The identity is none.
pub fn client(identity: &Identity, removed: &Removed) -> Result<Arc<ClientConfig>, Error> {
    let provider = provider();
    let inner =
        WebPkiServerVerifier::builder_with_provider(roots(identity.ca()?)?, Arc::clone(&provider))
            .build()
            .map_err(failed)?;
    let servers = Servers {
        inner,
        removed: removed.clone(),
    };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(failed)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(servers))
        .with_client_auth_cert(vec![identity.certificate()?], identity.key()?)
        .map_err(failed)?;
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// A CA that is known by the sum of its certificate.
#[derive(Debug)]
struct Pinned {
    ca: String,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let ca = between
            .iter()
            .find(|certificate| sum(certificate) == self.ca);
        let ca = ca.ok_or(CertificateError::UnknownIssuer)?;
        let roots = roots(ca.clone().into_owned())
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        let inner = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&self.provider))
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        // Any node has a certificate of this CA; only one has this name.
        let name = ServerName::try_from(pki::CA_NAME)
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        inner.verify_server_cert(end, &[], &name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 only".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// The end of a node that joins: it talks to the node with the key of the CA whose
/// certificate has this SHA-256, and to no other.
///
/// # Errors
/// None that is known.
pub fn joining(ca: &str) -> Result<Arc<ClientConfig>, Error> {
    let provider = provider();
    let pinned = Pinned {
        ca: ca.into(),
        provider: Arc::clone(&provider),
    };
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(failed)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(pinned))
        .with_no_client_auth();
    Ok(Arc::new(config))
}
