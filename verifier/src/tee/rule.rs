//! Rules on quotes of trusted execution environments: `[[tee]]` in a policy. Data only; a rule that would take any
//! enclave is refused when the policy is read.
//!
//! ```toml
//! [[tee]]
//! kind = "sgx"
//! mr_enclave = ["aa…"]                # or mr_signer with isv_prod_id
//! isv_svn_min = 3
//! tcb_status = ["UpToDate", "SWHardeningNeeded"]
//!
//! [[tee]]
//! kind = "tdx"
//! mr_td = ["bb…"]
//! rt_mr0 = ["cc…"]
//! td_attributes = "0000001000000000"
//! tcb_status = ["UpToDate"]
//! ```

use super::quote::{VerifiedTeeQuote, kind_name};
use crate::policy::EventDigest;
use crate::quote::short_hex;
use assay_wire::evidence::TeeKind;
use dcap_qvl::quote::{EnclaveReport, TDReport10};
use serde::{Deserialize, Serialize};

/// A quote that evidence must have. Members are in alphabetical order, as everywhere in a policy; lists are alternatives,
/// and an empty one asks for nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TeeRule {
    /// SGX: the product of its signer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub isv_prod_id: Option<u16>,
    /// SGX: the least security version of the product.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub isv_svn_min: Option<u16>,
    /// What it is.
    pub kind: TeeKind,
    /// SGX: the enclave.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mr_enclave: Vec<EventDigest>,
    /// SGX: who signed the enclave.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mr_signer: Vec<EventDigest>,
    /// TDX: what the domain began with, its firmware.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mr_td: Vec<Measurement>,
    /// TDX: firmware configuration.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rt_mr0: Vec<Measurement>,
    /// TDX: boot loader and kernel.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rt_mr1: Vec<Measurement>,
    /// TDX: command line and initrd.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rt_mr2: Vec<Measurement>,
    /// TDX: the application's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rt_mr3: Vec<Measurement>,
    /// What Intel may say of the platform's TCB.
    pub tcb_status: Vec<String>,
    /// TDX: the domain's attributes, all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub td_attributes: Option<Attributes>,
}

/// A measurement of a trust domain: SHA-384, hexadecimal.
#[serde_with::serde_as]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Measurement(#[serde_as(as = "serde_with::hex::Hex")] pub [u8; 48]);

/// `TDATTRIBUTES`, as the quote has them: 8 octets, hexadecimal.
#[serde_with::serde_as]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Attributes(#[serde_as(as = "serde_with::hex::Hex")] pub [u8; 8]);

impl TeeRule {
    /// Why this is no rule.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        let of_sgx = self.isv_prod_id.is_some()
            || self.isv_svn_min.is_some()
            || !self.mr_enclave.is_empty()
            || !self.mr_signer.is_empty();
        let of_tdx = self.td_attributes.is_some() || self.measurements().iter().any(|(_, wanted)| !wanted.is_empty());
        let unknown = self.tcb_status.iter().find(|status| !TCB_STATUSES.contains(&status.as_str()));
        if let Some(unknown) = unknown {
            return Some(format!("tcb_status `{unknown}` is none of {}", TCB_STATUSES.join(", ")));
        }
        let problem = match self.kind {
            _ if self.tcb_status.is_empty() => "has no tcb_status, so that it could never be met",
            TeeKind::Sgx if of_tdx => "is of SGX and asks for what only TDX has",
            TeeKind::Tdx if of_sgx => "is of TDX and asks for what only SGX has",
            TeeKind::Sgx if self.mr_enclave.is_empty() && (self.mr_signer.is_empty() || self.isv_prod_id.is_none()) => {
                "names no enclave: give mr_enclave, or mr_signer and isv_prod_id"
            }
            TeeKind::Tdx if self.mr_td.is_empty() => "names no domain: give mr_td",
            TeeKind::Sgx | TeeKind::Tdx => return None,
        };
        Some(problem.to_owned())
    }

    pub(super) fn kind_name(&self) -> &'static str {
        kind_name(self.kind)
    }

    /// What deviates in a quote of the rule's kind.
    #[must_use]
    pub fn deviations(&self, quote: &VerifiedTeeQuote, report_data: &[u8; 64]) -> Vec<String> {
        let kind = self.kind_name();
        let mut problems = match (quote.enclave(), quote.trust_domain()) {
            (Some(enclave), _) => self.enclave_deviations(enclave),
            (_, Some(domain)) => self.domain_deviations(domain),
            (None, None) => vec![format!("the {kind} quote measures nothing")],
        };
        if quote.kind() != self.kind {
            problems.push(format!("the quote is not of {kind}"));
        }
        if quote.report_data() != report_data {
            problems.push(format!("the {kind} quote is not bound to this TPM and nonce: its report data is another"));
        }
        let status = quote.tcb_status();
        if !self.tcb_status.iter().any(|allowed| allowed == status) {
            let advisories = quote.advisories().join(", ");
            let because = if advisories.is_empty() { String::new() } else { format!(" ({advisories})") };
            problems.push(format!("the {kind} platform is {status}{because}, which the policy does not allow"));
        }
        problems
    }

    fn enclave_deviations(&self, enclave: &EnclaveReport) -> Vec<String> {
        let mut problems = Vec::new();
        let digests =
            [("MRENCLAVE", &self.mr_enclave, &enclave.mr_enclave), ("MRSIGNER", &self.mr_signer, &enclave.mr_signer)];
        for (name, wanted, found) in digests {
            if !wanted.is_empty() && !wanted.iter().any(|wanted| wanted.0 == *found) {
                problems.push(format!("{name} is {}, which the policy does not list", short_hex(found)));
            }
        }
        if let Some(wanted) = self.isv_prod_id.filter(|wanted| *wanted != enclave.isv_prod_id) {
            problems.push(format!("ISVPRODID is {}, not {wanted}", enclave.isv_prod_id));
        }
        if let Some(least) = self.isv_svn_min.filter(|least| *least > enclave.isv_svn) {
            problems.push(format!("ISVSVN is {}, less than {least}", enclave.isv_svn));
        }
        problems
    }

    fn domain_deviations(&self, domain: &TDReport10) -> Vec<String> {
        let found = [&domain.mr_td, &domain.rt_mr0, &domain.rt_mr1, &domain.rt_mr2, &domain.rt_mr3];
        let pairs = self.measurements().into_iter().zip(found);
        let differs =
            pairs.filter(|((_, wanted), found)| !wanted.is_empty() && !wanted.iter().any(|wanted| wanted.0 == **found));
        let mut problems: Vec<_> = differs
            .map(|((name, _), found)| format!("{name} is {}, which the policy does not list", short_hex(found)))
            .collect();
        if let Some(wanted) = self.td_attributes.filter(|wanted| wanted.0 != domain.td_attributes) {
            let (found, wanted) = (hex::encode(domain.td_attributes), hex::encode(wanted.0));
            problems.push(format!("the domain's attributes are {found}, not {wanted}"));
        }
        problems
    }

    fn measurements(&self) -> [(&'static str, &Vec<Measurement>); 5] {
        [
            ("MRTD", &self.mr_td),
            ("RTMR0", &self.rt_mr0),
            ("RTMR1", &self.rt_mr1),
            ("RTMR2", &self.rt_mr2),
            ("RTMR3", &self.rt_mr3),
        ]
    }
}

/// What Intel says of a platform, but for `Revoked`, which no policy may allow.
const TCB_STATUSES: [&str; 8] = [
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "TDRelaunchAdvised",
    "TDRelaunchAdvisedConfigurationNeeded",
];
