//! Keys and certificates. The first node is the cluster's CA; each node's certificate says
//! its name, and that it is a node of this cluster.

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
    PublicKeyData as _,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use supercloud_api::{Code, Error};
use time::{Duration, OffsetDateTime};

/// The name that only the node with the CA's key has beside its own.
pub const CA_NAME: &str = "ca.supercloud";
/// How long certificates last. There is no renewal: a cluster that lives longer is made anew.
const LIFE: Duration = Duration::days(3650);
/// Clocks of nodes may differ by so much when one joins.
const SKEW: Duration = Duration::days(1);

/// Who a node is, to others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its name.
    pub name: String,
    /// Its key, PEM.
    pub key: String,
    /// Its certificate, PEM.
    pub certificate: String,
    /// The CA's certificate, PEM.
    pub ca: String,
    /// The CA's key, on the node that has it.
    pub ca_key: Option<String>,
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::failed(format!("a certificate: {error}"))
}

/// The name in a node's certificate. Names of nodes are no host names: it is made of a sum.
#[must_use]
pub fn server_name(node: &str) -> String {
    let sum = blake3::hash(node.as_bytes()).to_hex();
    format!("n{}.supercloud", sum.get(..32).unwrap_or_default())
}

/// SHA-256, hexadecimal.
#[must_use]
pub fn sum(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn params(names: Vec<String>, common: &str) -> Result<CertificateParams, Error> {
    let mut params = CertificateParams::new(names).map_err(failed)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common);
    let now = OffsetDateTime::now_utc();
    params.not_before = now - SKEW;
    params.not_after = now + LIFE;
    Ok(params)
}

fn of_node(name: &str, is_ca: bool) -> Result<CertificateParams, Error> {
    let mut names = vec![server_name(name)];
    if is_ca {
        names.push(CA_NAME.into());
    }
    let mut params = params(names, name)?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    Ok(params)
}

fn new_key() -> Result<KeyPair, Error> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)
}

impl Identity {
    /// The first node of a cluster of its own.
    ///
    /// # Errors
    /// There are no random bytes.
    pub fn first(name: &str) -> Result<Self, Error> {
        let ca_key = new_key()?;
        let mut ca_params = params(Vec::new(), "supercloud CA")?;
        ca_params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        ca_params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let ca = ca_params.self_signed(&ca_key).map_err(failed)?;
        let ca_text = ca_key.serialize_pem();
        let issuer = Issuer::new(ca_params, ca_key);
        let key = new_key()?;
        let certificate = of_node(name, true)?.signed_by(&key, &issuer);
        Ok(Self {
            name: name.into(),
            key: key.serialize_pem(),
            certificate: certificate.map_err(failed)?.pem(),
            ca: ca.pem(),
            ca_key: Some(ca_text),
        })
    }

    /// Signs the key of a node that joins. What else its request says counts nothing.
    ///
    /// # Errors
    /// This node has not the CA's key, or it is no request.
    pub fn sign(&self, name: &str, request: &str) -> Result<String, Error> {
        let ca_key = self.ca_key.as_ref().ok_or_else(no_ca)?;
        let asked = CertificateSigningRequestParams::from_pem(request)
            .map_err(|error| Error::new(Code::BadRequest, error.to_string(), ""))?;
        let key = KeyPair::from_pem(ca_key).map_err(failed)?;
        let issuer = Issuer::from_ca_cert_pem(&self.ca, key).map_err(failed)?;
        let signed = of_node(name, false)?.signed_by(&asked.public_key, &issuer);
        Ok(signed.map_err(failed)?.pem())
    }

    /// Its certificate, DER.
    ///
    /// # Errors
    /// It is none.
    pub fn certificate(&self) -> Result<CertificateDer<'static>, Error> {
        certificate(&self.certificate)
    }

    /// The CA's, DER.
    ///
    /// # Errors
    /// It is none.
    pub fn ca(&self) -> Result<CertificateDer<'static>, Error> {
        certificate(&self.ca)
    }

    /// Its key.
    ///
    /// # Errors
    /// It is none.
    pub fn key(&self) -> Result<PrivateKeyDer<'static>, Error> {
        PrivateKeyDer::from_pem_slice(self.key.as_bytes()).map_err(failed)
    }

    /// SHA-256 of its certificate.
    ///
    /// # Errors
    /// It is none.
    pub fn fingerprint(&self) -> Result<String, Error> {
        Ok(sum(&self.certificate()?))
    }
}

/// Only the node with the CA's key can do that.
#[must_use]
pub fn no_ca() -> Error {
    Error::new(
        Code::NotAllowed,
        "this node has not the key of the cluster's CA",
        "ask the node that has it: `supercloud node list` marks it; --node NAME",
    )
}

/// A certificate of its PEM.
///
/// # Errors
/// It is none.
pub fn certificate(pem: &str) -> Result<CertificateDer<'static>, Error> {
    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(failed)
}

/// A key of a node that is to join, PEM, and its request.
///
/// # Errors
/// There are no random bytes.
pub fn new_request(name: &str) -> Result<(String, String), Error> {
    let key = new_key()?;
    let request = request(name, &key)?;
    Ok((key.serialize_pem(), request))
}

/// A request of a key that was made before.
///
/// # Errors
/// It is no key.
pub fn request_of(name: &str, key: &str) -> Result<String, Error> {
    request(name, &KeyPair::from_pem(key).map_err(failed)?)
}

fn request(name: &str, key: &KeyPair) -> Result<String, Error> {
    let asked = of_node(name, false)?.serialize_request(key);
    asked.and_then(|asked| asked.pem()).map_err(failed)
}

/// SHA-256 of the key that a request is of.
///
/// # Errors
/// It is no request.
pub fn key_of(request: &str) -> Result<String, Error> {
    let asked = CertificateSigningRequestParams::from_pem(request)
        .map_err(|error| Error::new(Code::BadRequest, error.to_string(), ""))?;
    Ok(sum(asked.public_key.der_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_node_signs() {
        let first = Identity::first("a").expect("made");
        let (key, request) = new_request("b").expect("made");
        let certificate = first.sign("b", &request).expect("signed");
        let second = Identity {
            name: "b".into(),
            key: key.clone(),
            certificate,
            ca: first.ca.clone(),
            ca_key: None,
        };
        assert_ne!(first.fingerprint(), second.fingerprint());
        assert_eq!(
            second.sign("c", &request).expect_err("no key").code,
            Code::NotAllowed
        );
        assert_eq!(
            first.sign("b", "nonsense").expect_err("none").code,
            Code::BadRequest
        );
        let again = request_of("b", &key).expect("made");
        assert_eq!(key_of(&again), key_of(&request));
    }
}
