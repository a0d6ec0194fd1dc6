//! The login phase (RFC 7143 §6.3): who the initiator is, whether it proves it, and which parameters hold.
//!
//! ```text
//! SecurityNegotiation ──proven, T──▶ LoginOperationalNegotiation ──T──▶ Finished (asks the session registry)
//!         └──────────────────────────proven, T, NSG=3──────────────────────▲
//! ```
//!
//! Pure: one login request in, one [`Step`] out. A target with CHAP cannot be reached past the security stage without
//! a proof; a login that starts in a later stage is refused. Whether a target exists is not told to those it does not
//! accept.

use crate::chap::{
    CHALLENGE_OCTETS, ChapAlgorithm, ChapAlgorithms, ChapCredentials, ChapExchange, decode_binary, encode_binary,
};
use crate::negotiation::{Parameters, RECEIVE_SEGMENT_OCTETS};
use crate::pdu::{CONTINUE, FINAL, Opcode, Pdu};
use crate::target::{Authentication, Directory, PORTAL_GROUP_TAG, Target};
use crate::text;
use std::sync::Arc;

/// Most octets of one negotiation text, over all its PDUs.
const TEXT_LIMIT: usize = 16 * 1024;
/// Most login requests of one login; initiators need three to five.
const REQUESTS_LIMIT: u32 = 32;

/// Random octets for one connection's CHAP challenge, from the driver's secure source; never used twice.
#[derive(Clone)]
pub struct ChallengeEntropy(pub [u8; CHALLENGE_OCTETS + 1]);

impl std::fmt::Debug for ChallengeEntropy {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("ChallengeEntropy(..)")
    }
}

/// Status class and detail of a refused login (RFC 7143 §11.13.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum LoginStatus {
    /// The request breaks the protocol.
    InitiatorError = 0x0200,
    /// The proof is missing or wrong.
    AuthenticationFailure = 0x0201,
    /// No such target for this initiator, or its only session belongs to another initiator port.
    AuthorizationFailure = 0x0202,
    /// There is no such target, as far as this initiator is told.
    NotFound = 0x0203,
    /// No protocol version in common.
    UnsupportedVersion = 0x0205,
    /// The session has its connection already.
    TooManyConnections = 0x0206,
    /// A key that the login cannot do without is missing.
    MissingParameter = 0x0207,
    /// Neither normal nor discovery.
    UnsupportedSessionType = 0x0209,
    /// The TSIH names no session here.
    NoSuchSession = 0x020a,
    /// Not a login request, or one that leaves the order of stages.
    InvalidDuringLogin = 0x020b,
    /// The target cannot serve now; the initiator may try again.
    ServiceUnavailable = 0x0301,
}

/// What one login request leads to.
#[derive(Debug)]
pub(crate) enum Step {
    /// Answer with these flags and this text, and go on.
    Answer { flags: u8, text: Vec<u8> },
    /// The login is decided; once the session registry agrees, answer with these flags and this text.
    Finish { flags: u8, text: Vec<u8> },
    /// Answer with this status, then close.
    Refuse(LoginStatus),
}

/// What is known of a finished login.
#[derive(Debug)]
pub(crate) struct Identity {
    pub(crate) initiator: String,
    pub(crate) isid: [u8; 6],
    /// Connection id, which a logout may name.
    pub(crate) cid: u16,
    pub(crate) kind: SessionKind,
}

/// What a session is for.
#[derive(Debug)]
pub(crate) enum SessionKind {
    /// SCSI to this target.
    Normal(Arc<Target>),
    /// SendTargets; these are the targets that it lists.
    Discovery(Vec<Arc<Target>>),
}

/// One login under way.
pub(crate) struct Login {
    directory: Arc<dyn Directory>,
    entropy: ChallengeEntropy,
    pub(crate) parameters: Parameters,
    pub(crate) identity: Option<Identity>,
    first: Option<First>,
    proof: Proof,
    stage: Stage,
    text: Vec<u8>,
    requests: u32,
    declared: bool,
}

/// Fields that every request of one login repeats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct First {
    isid: [u8; 6],
    cid: u16,
    task_tag: u32,
}

/// Stages by number (RFC 7143 §11.12.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Security = 0,
    Operational = 1,
    FullFeature = 3,
}

impl Stage {
    fn from_bits(bits: u8) -> Option<Self> {
        match bits & 3 {
            0 => Some(Self::Security),
            1 => Some(Self::Operational),
            3 => Some(Self::FullFeature),
            _ => None,
        }
    }
}

/// How far the initiator's proof is.
enum Proof {
    /// Nothing said yet.
    Open,
    /// CHAP was agreed on; its algorithm comes next.
    Agreed,
    /// The challenge is out.
    Challenged(ChapExchange),
    /// Proven, or none is asked for.
    Passed,
}

impl Login {
    pub(crate) fn new(directory: Arc<dyn Directory>, entropy: ChallengeEntropy) -> Self {
        Self {
            directory,
            entropy,
            parameters: Parameters::default(),
            identity: None,
            first: None,
            proof: Proof::Open,
            stage: Stage::Security,
            text: Vec::new(),
            requests: 0,
            declared: false,
        }
    }

    /// Takes one request.
    pub(crate) fn request(&mut self, pdu: &Pdu) -> Step {
        match self.decide(pdu) {
            Ok(step) => step,
            Err(status) => Step::Refuse(status),
        }
    }

    fn decide(&mut self, pdu: &Pdu) -> Result<Step, LoginStatus> {
        let (current, next) = self.check_header(pdu)?;
        if self.text.len() + pdu.data.len() > TEXT_LIMIT {
            return Err(LoginStatus::InitiatorError);
        }
        self.text.extend_from_slice(&pdu.data);
        let stage_bits = (current as u8) << 2;
        if pdu.header.flags() & CONTINUE != 0 {
            return Ok(Step::Answer { flags: stage_bits, text: Vec::new() });
        }
        let received = std::mem::take(&mut self.text);
        let pairs = text::parse(&received).map_err(|_| LoginStatus::InitiatorError)?;
        let mut answer = Vec::new();
        if self.identity.is_none() {
            self.identify(&pairs, &mut answer)?;
        }
        if current == Stage::Operational {
            self.settle_without_security()?;
        }
        self.negotiate(&pairs, &mut answer)?;
        if current == Stage::Operational && !self.declared {
            self.declared = true;
            text::append(&mut answer, "MaxRecvDataSegmentLength", &RECEIVE_SEGMENT_OCTETS.to_string());
        }
        if next.is_some() && matches!(self.proof, Proof::Open) && !self.needs_chap() {
            self.proof = Proof::Passed;
        }
        let Some(next) = next.filter(|_| matches!(self.proof, Proof::Passed)) else {
            return Ok(Step::Answer { flags: stage_bits, text: answer });
        };
        let flags = FINAL | stage_bits | next as u8;
        self.stage = next;
        if next != Stage::FullFeature {
            return Ok(Step::Answer { flags, text: answer });
        }
        self.parameters.finish();
        Ok(Step::Finish { flags, text: answer })
    }

    /// The current stage and the one asked for, if the header fits this login.
    fn check_header(&mut self, pdu: &Pdu) -> Result<(Stage, Option<Stage>), LoginStatus> {
        let header = &pdu.header;
        self.requests += 1;
        if header.opcode() != Some(Opcode::Login) || self.requests > REQUESTS_LIMIT {
            return Err(LoginStatus::InvalidDuringLogin);
        }
        // Octet 3 is the lowest version the initiator speaks; ours is 0 (RFC 7143 §11.12.4).
        if header.array::<4>(0)[3] > 0 {
            return Err(LoginStatus::UnsupportedVersion);
        }
        if header.half(14) != 0 {
            return Err(LoginStatus::NoSuchSession);
        }
        let repeated = First { isid: header.array(8), cid: header.half(20), task_tag: header.task_tag() };
        if *self.first.get_or_insert(repeated) != repeated {
            return Err(LoginStatus::InvalidDuringLogin);
        }
        let flags = header.flags();
        let current = Stage::from_bits(flags >> 2).ok_or(LoginStatus::InvalidDuringLogin)?;
        let may_start_here = self.requests == 1 && current == Stage::Operational;
        if current == Stage::FullFeature || (current != self.stage && !may_start_here) {
            return Err(LoginStatus::InvalidDuringLogin);
        }
        self.stage = current;
        if !header.is_final() {
            return Ok((current, None));
        }
        let next = Stage::from_bits(flags).filter(|next| *next > current).ok_or(LoginStatus::InvalidDuringLogin)?;
        if flags & CONTINUE != 0 {
            return Err(LoginStatus::InitiatorError);
        }
        Ok((current, Some(next)))
    }

    /// Reads the names of the first text: who wants what.
    fn identify(&mut self, pairs: &[(&str, &str)], answer: &mut Vec<u8>) -> Result<(), LoginStatus> {
        let find = |wanted| pairs.iter().find(|(key, _)| *key == wanted).map(|(_, value)| *value);
        let initiator = find("InitiatorName").ok_or(LoginStatus::MissingParameter)?;
        if initiator.is_empty() || initiator.len() > 223 {
            return Err(LoginStatus::InitiatorError);
        }
        let kind = match find("SessionType").unwrap_or("Normal") {
            "Normal" => {
                let name = find("TargetName").ok_or(LoginStatus::MissingParameter)?;
                let target = self.directory.target(name, initiator).ok_or(LoginStatus::NotFound)?;
                text::append(answer, "TargetPortalGroupTag", &PORTAL_GROUP_TAG.to_string());
                SessionKind::Normal(target)
            }
            "Discovery" => SessionKind::Discovery(self.directory.visible_to(initiator)),
            _ => return Err(LoginStatus::UnsupportedSessionType),
        };
        let first = self.first.ok_or(LoginStatus::InitiatorError)?;
        self.identity = Some(Identity { initiator: initiator.to_owned(), isid: first.isid, cid: first.cid, kind });
        Ok(())
    }

    /// A login in the operational stage has passed the security stage, or skipped it where nothing is to be proven.
    fn settle_without_security(&mut self) -> Result<(), LoginStatus> {
        match self.proof {
            Proof::Passed => Ok(()),
            Proof::Open if !self.needs_chap() => {
                self.proof = Proof::Passed;
                Ok(())
            }
            Proof::Open | Proof::Agreed | Proof::Challenged(_) => Err(LoginStatus::AuthenticationFailure),
        }
    }

    fn negotiate(&mut self, pairs: &[(&str, &str)], answer: &mut Vec<u8>) -> Result<(), LoginStatus> {
        let find = |wanted| pairs.iter().find(|(key, _)| *key == wanted).map(|(_, value)| *value);
        for (key, value) in pairs {
            match *key {
                "InitiatorName" | "InitiatorAlias" | "TargetName" | "SessionType" => {}
                "AuthMethod" => self.choose_method(value, answer)?,
                "CHAP_A" => self.challenge(value, answer)?,
                "CHAP_N" => {
                    let response = find("CHAP_R").ok_or(LoginStatus::MissingParameter)?;
                    let mutual = find("CHAP_I").zip(find("CHAP_C"));
                    self.verify(value, response, mutual, answer)?;
                }
                "CHAP_R" | "CHAP_I" | "CHAP_C" => {
                    find("CHAP_N").ok_or(LoginStatus::MissingParameter)?;
                }
                _ => {
                    if let Some(settled) = self.parameters.settle(key, value) {
                        text::append(answer, key, &settled);
                    }
                }
            }
        }
        Ok(())
    }

    fn choose_method(&mut self, offered: &str, answer: &mut Vec<u8>) -> Result<(), LoginStatus> {
        let Proof::Open = self.proof else {
            return Err(LoginStatus::InitiatorError);
        };
        let wanted = if self.needs_chap() { "CHAP" } else { "None" };
        if !offered.split(',').any(|method| method == wanted) {
            return Err(LoginStatus::AuthenticationFailure);
        }
        self.proof = if self.needs_chap() { Proof::Agreed } else { Proof::Passed };
        text::append(answer, "AuthMethod", wanted);
        Ok(())
    }

    fn challenge(&mut self, offered: &str, answer: &mut Vec<u8>) -> Result<(), LoginStatus> {
        let Proof::Agreed = self.proof else {
            return Err(LoginStatus::InitiatorError);
        };
        let algorithm = ChapAlgorithm::choose(offered, self.algorithms()).ok_or(LoginStatus::AuthenticationFailure)?;
        let [identifier, challenge @ ..] = self.entropy.0;
        text::append(answer, "CHAP_A", &algorithm.number().to_string());
        text::append(answer, "CHAP_I", &identifier.to_string());
        text::append(answer, "CHAP_C", &encode_binary(&challenge));
        self.proof = Proof::Challenged(ChapExchange { algorithm, identifier, challenge });
        Ok(())
    }

    fn verify(
        &mut self,
        name: &str,
        response: &str,
        mutual: Option<(&str, &str)>,
        answer: &mut Vec<u8>,
    ) -> Result<(), LoginStatus> {
        // The challenge is taken away: a second guess needs a new connection.
        let Proof::Challenged(exchange) = std::mem::replace(&mut self.proof, Proof::Agreed) else {
            return Err(LoginStatus::InitiatorError);
        };
        let response = decode_binary(response).ok_or(LoginStatus::AuthenticationFailure)?;
        let identity = self.identity.as_mut().ok_or(LoginStatus::AuthenticationFailure)?;
        let accepts = |target: &Arc<Target>| {
            chap(target).is_some_and(|chap| {
                chap.algorithms.allow(exchange.algorithm) && chap.initiator.accepts(&exchange, name, &response)
            })
        };
        let proven_to = match &mut identity.kind {
            SessionKind::Normal(target) => Some(target.clone()).filter(|target| accepts(target)),
            SessionKind::Discovery(targets) => {
                targets.retain(accepts);
                targets.first().cloned()
            }
        };
        let target = proven_to.ok_or(LoginStatus::AuthenticationFailure)?;
        if let Some((identifier, challenge)) = mutual {
            answer_challenge(&target, &exchange, identifier, challenge, answer)?;
        }
        self.proof = Proof::Passed;
        Ok(())
    }

    /// What may be used before it is known which of several targets the proof is for: what any of them allows. A
    /// stranger to all is asked like everyone.
    fn algorithms(&self) -> ChapAlgorithms {
        let allows_md5 =
            |target: &Arc<Target>| chap(target).is_some_and(|chap| chap.algorithms == ChapAlgorithms::WithMd5);
        let with_md5 = match self.identity.as_ref().map(|identity| &identity.kind) {
            Some(SessionKind::Normal(target)) => allows_md5(target),
            Some(SessionKind::Discovery(targets)) => targets.is_empty() || targets.iter().any(allows_md5),
            None => false,
        };
        if with_md5 { ChapAlgorithms::WithMd5 } else { ChapAlgorithms::Sha256 }
    }

    /// Discovery asks for CHAP unless every target that it could list does without.
    fn needs_chap(&self) -> bool {
        match self.identity.as_ref().map(|identity| &identity.kind) {
            Some(SessionKind::Normal(target)) => chap(target).is_some(),
            Some(SessionKind::Discovery(targets)) => {
                targets.is_empty() || targets.iter().any(|target| chap(target).is_some())
            }
            None => true,
        }
    }
}

/// Proves the target to the initiator (mutual CHAP).
fn answer_challenge(
    target: &Target,
    exchange: &ChapExchange,
    identifier: &str,
    challenge: &str,
    answer: &mut Vec<u8>,
) -> Result<(), LoginStatus> {
    let challenge = decode_binary(challenge).ok_or(LoginStatus::InitiatorError)?;
    let identifier: u8 = identifier.parse().map_err(|_| LoginStatus::InitiatorError)?;
    // RFC 7143 §12.1.3: a challenge that comes back is a reflection attack.
    if challenge.is_empty() || challenge == exchange.challenge {
        return Err(LoginStatus::AuthenticationFailure);
    }
    let credentials = chap(target).and_then(|chap| chap.target).ok_or(LoginStatus::AuthenticationFailure)?;
    text::append(answer, "CHAP_N", &credentials.name);
    text::append(answer, "CHAP_R", &encode_binary(&credentials.response(exchange.algorithm, identifier, &challenge)));
    Ok(())
}

/// A target's CHAP configuration.
struct Chap<'a> {
    initiator: &'a ChapCredentials,
    target: Option<&'a ChapCredentials>,
    algorithms: ChapAlgorithms,
}

fn chap(target: &Target) -> Option<Chap<'_>> {
    match &target.config().authentication {
        Authentication::None => None,
        Authentication::Chap { initiator, target, algorithms } => {
            Some(Chap { initiator, target: target.as_ref(), algorithms: *algorithms })
        }
    }
}
