//! Verifying a quote: its signature, the certificates up to Intel's root, their revocation and the platform's TCB, by
//! `dcap-qvl`. [`verify`] is the one maker of a [`VerifiedTeeQuote`].

use assay_tpm::algorithm::HashAlgorithm;
use assay_wire::evidence::{MAX_TEE_QUOTE_BYTES, TeeKind, TeeQuote};
use dcap_qvl::QuoteCollateralV3;
use dcap_qvl::quote::{EnclaveReport, Quote, Report, TDReport10};
use dcap_qvl::verify::QuoteVerifier;
use serde::{Deserialize, Serialize};
use std::fmt;

/// What an operator fetched from Intel's provisioning certification service: issuers, revocation lists, TCB levels and
/// the quoting enclaves' identities. Signed by Intel and valid for about a month.
#[derive(Debug, Clone, Default)]
pub struct Collateral(Vec<Document>);

/// One document, and the text that it was read from: what is kept beside a verdict.
#[derive(Debug, Clone)]
struct Document {
    digest: CollateralDigest,
    text: String,
    collateral: QuoteCollateralV3,
}

/// SHA-256 of a document's text.
#[serde_with::serde_as]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CollateralDigest(#[serde_as(as = "serde_with::hex::Hex")] [u8; 32]);

impl CollateralDigest {
    fn of(text: &str) -> Self {
        let mut digest = [0; 32];
        digest.copy_from_slice(HashAlgorithm::Sha256.digest(text.as_bytes()).as_ref());
        Self(digest)
    }
}

impl fmt::Display for CollateralDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for CollateralDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a file is no collateral.
#[derive(Debug, thiserror::Error)]
pub enum CollateralError {
    /// Not collateral, or of another version.
    #[error("reading TEE collateral {file} as JSON")]
    Json {
        /// Which file.
        file: String,
        /// Why not.
        source: serde_json::Error,
    },
    /// More files than there are kinds of machines.
    #[error("more than {MOST_COLLATERAL} files of TEE collateral")]
    TooMany,
    /// More octets than an exported verdict has room for.
    #[error("more than {MAX_COLLATERAL_BYTES} octets of TEE collateral")]
    TooLarge,
}

impl Collateral {
    /// Reads collateral, one document a file, in the form of Intel's `sgx_ql_qve_collateral_t` as JSON.
    ///
    /// # Errors
    /// A file holds something else.
    pub fn from_files<'a>(files: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self, CollateralError> {
        let (mut documents, mut bytes) = (Vec::new(), 0);
        for (file, text) in files {
            bytes += text.len();
            if documents.len() >= MOST_COLLATERAL {
                return Err(CollateralError::TooMany);
            }
            if bytes > MAX_COLLATERAL_BYTES {
                return Err(CollateralError::TooLarge);
            }
            let json = |source| CollateralError::Json { file: file.to_owned(), source };
            let collateral = serde_json::from_str(text).map_err(json)?;
            documents.push(Document { digest: CollateralDigest::of(text), text: text.to_owned(), collateral });
        }
        Ok(Self(documents))
    }

    /// What each document is known by, in their order.
    #[must_use]
    pub fn digests(&self) -> Vec<CollateralDigest> {
        self.0.iter().map(|document| document.digest).collect()
    }

    /// The documents as they were read.
    pub fn texts(&self) -> impl Iterator<Item = (CollateralDigest, &str)> {
        self.0.iter().map(|document| (document.digest, document.text.as_str()))
    }

    /// The documents of these digests, in this order; none if one is not there.
    #[must_use]
    pub fn named(&self, digests: &[CollateralDigest]) -> Option<Self> {
        let find = |wanted: &CollateralDigest| self.0.iter().find(|document| document.digest == *wanted).cloned();
        digests.iter().map(find).collect::<Option<Vec<_>>>().map(Self)
    }

    /// How many documents there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Why a quote is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TeeError {
    /// Larger than any quote.
    #[error("a {kind} quote has {bytes} octets, more than {MAX_TEE_QUOTE_BYTES}")]
    TooLarge {
        /// What it says to be.
        kind: &'static str,
        /// How large it is.
        bytes: usize,
    },
    /// Not a quote.
    #[error("a {kind} quote cannot be read: {problem}")]
    Malformed {
        /// What it says to be.
        kind: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// There is nothing to check it with.
    #[error("there is no collateral for {kind} quotes: give the verifier `tee_collateral_dir`")]
    NoCollateral {
        /// What it says to be.
        kind: &'static str,
    },
    /// Signature, certificates, revocation, expiry, debug mode: the library's words.
    #[error("a {kind} quote is refused by each of {documents} documents of collateral: {problem}")]
    NotVerified {
        /// What it says to be.
        kind: &'static str,
        /// How many documents were tried.
        documents: usize,
        /// Why the last was not enough.
        problem: String,
    },
    /// An enclave's quote as a trust domain's, or the other way round.
    #[error("a quote says to be of {kind} and is not")]
    Kind {
        /// What it says to be.
        kind: &'static str,
    },
}

/// A quote whose signature, certificates and TCB are Intel's: what it measures, not yet whether that is good.
#[derive(Debug, Clone)]
pub struct VerifiedTeeQuote {
    kind: TeeKind,
    report: Report,
    tcb_status: String,
    advisories: Vec<String>,
}

impl VerifiedTeeQuote {
    /// Whose it is.
    #[must_use]
    pub fn kind(&self) -> TeeKind {
        self.kind
    }

    /// How up to date the platform and its quoting enclave are, in Intel's words: `UpToDate`, `OutOfDate`, …
    #[must_use]
    pub fn tcb_status(&self) -> &str {
        &self.tcb_status
    }

    /// Intel's advisories that the platform has not met.
    #[must_use]
    pub fn advisories(&self) -> &[String] {
        &self.advisories
    }

    /// The 64 octets that the enclave or trust domain put in.
    #[must_use]
    pub fn report_data(&self) -> &[u8; 64] {
        match (self.enclave(), self.trust_domain()) {
            (Some(enclave), _) => &enclave.report_data,
            (_, Some(domain)) => &domain.report_data,
            (None, None) => &[0; 64], // a report is one or the other
        }
    }

    /// The enclave, if it is one.
    pub(super) fn enclave(&self) -> Option<&EnclaveReport> {
        match &self.report {
            Report::SgxEnclave(report) => Some(report),
            Report::TD10(_) | Report::TD15(_) | Report::TD15Ex(_) => None,
        }
    }

    /// The trust domain, if it is one.
    pub(super) fn trust_domain(&self) -> Option<&TDReport10> {
        match &self.report {
            Report::SgxEnclave(_) => None,
            Report::TD10(report) => Some(report),
            Report::TD15(report) => Some(&report.base),
            Report::TD15Ex(report) => Some(&report.base.base),
        }
    }
}

/// Verifies a quote with whichever collateral fits it. Debug enclaves and domains, and domains that are bound to service
/// domains, are refused.
///
/// # Errors
/// See [`TeeError`].
pub fn verify(quote: &TeeQuote, collateral: &Collateral, now_seconds: i64) -> Result<VerifiedTeeQuote, TeeError> {
    let kind = kind_name(quote.kind);
    if quote.quote.len() > MAX_TEE_QUOTE_BYTES {
        return Err(TeeError::TooLarge { kind, bytes: quote.quote.len() });
    }
    let decoded = Quote::parse(&quote.quote).map_err(|error| TeeError::Malformed { kind, problem: words(&error) })?;
    if matches!(decoded.report, Report::SgxEnclave(_)) != (quote.kind == TeeKind::Sgx) {
        return Err(TeeError::Kind { kind });
    }
    let now = u64::try_from(now_seconds).unwrap_or(0);
    let verifier = QuoteVerifier::new_prod();
    let mut refused = TeeError::NoCollateral { kind };
    for document in &collateral.0 {
        match verifier.verify(&quote.quote, &document.collateral, now) {
            Ok(verified) => {
                return Ok(VerifiedTeeQuote {
                    kind: quote.kind,
                    report: verified.report,
                    tcb_status: verified.status,
                    advisories: verified.advisory_ids,
                });
            }
            Err(error) => {
                refused = TeeError::NotVerified { kind, documents: collateral.len(), problem: words(&error) };
            }
        }
    }
    Err(refused)
}

/// The library's words, which may quote what a node sent.
fn words(error: &impl fmt::Display) -> String {
    format!("{error:#}").chars().filter(|letter| !letter.is_control()).take(MOST_WORDS).collect()
}

/// What people call it.
pub(super) fn kind_name(kind: TeeKind) -> &'static str {
    match kind {
        TeeKind::Sgx => "SGX",
        TeeKind::Tdx => "TDX",
    }
}

const MOST_WORDS: usize = 300;
const MOST_COLLATERAL: usize = 64;
/// One document has about 20 KB.
pub(super) const MAX_COLLATERAL_BYTES: usize = 2 << 20;
