//! The tenant's secret: whole from one verifier, or a share from each of several, which are joined here and nowhere else.
//! What is not all there is nothing: it is asked for again, and only the whole secret is written. It goes when this node
//! is revoked, or when a verifier that gave a share of it vouches no more.

use super::notices::write_private;
use super::prover::Prover;
use super::random;
use super::supervisor::Supervisor;
use super::verifier::AttestationClient;
use crate::backoff::Patience;
use crate::console::Chain;
use crate::tpm::Tpm;
use assay_wire::attestation::{SealedSecret, join_shares};
use futures_util::future::join_all;
use std::convert::Infallible;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use zeroize::Zeroizing;

/// Where it is put together.
pub(super) struct Secrets {
    verifiers: Vec<AttestationClient>,
    /// What each of them said, in the same order.
    said: Mutex<Vec<Said>>,
    path: PathBuf,
}

/// What a verifier said of the secret.
#[derive(Debug, PartialEq)]
enum Said {
    /// Nothing yet, or it could not be heard; in words.
    Unheard(String),
    /// It has none for this node.
    None,
    /// One of this many shares.
    Share { of: u8, content: Zeroizing<Vec<u8>> },
    /// It vouches no more: what it gave does not count, and it gives nothing.
    Withdrawn,
}

/// What they said comes to.
#[derive(Debug, PartialEq)]
enum Gathered {
    /// All of it.
    Whole(Zeroizing<Vec<u8>>),
    /// Nobody has any of it.
    Nothing,
    /// Some of them could not be heard, and the others have none.
    Unknown,
    /// So many shares of so many.
    Missing { have: usize, of: usize },
    /// They are not shares of one secret.
    Contradiction(&'static str),
}

/// Puts shares together. One that says that it is all of the secret is all of it, if nobody else has any.
fn gather(said: &[Said]) -> Gathered {
    let shares = said.iter().filter_map(|said| match said {
        Said::Share { of, content } => Some((usize::from(*of), content)),
        Said::Unheard(_) | Said::None | Said::Withdrawn => None,
    });
    let (of, contents): (Vec<_>, Vec<_>) = shares.unzip();
    let Some(&count) = of.first() else {
        let unheard = said.iter().any(|said| matches!(said, Said::Unheard(_)));
        return if unheard { Gathered::Unknown } else { Gathered::Nothing };
    };
    if of.iter().any(|of| *of != count) {
        return Gathered::Contradiction("its verifiers do not say the same number of shares");
    }
    match contents.len() {
        have if have > count => Gathered::Contradiction("there are more shares of it than it has"),
        have if have < count => Gathered::Missing { have, of: count },
        _ => match join_shares(&contents) {
            Some(secret) => Gathered::Whole(Zeroizing::new(secret)),
            None => Gathered::Contradiction("its shares differ in length"),
        },
    }
}

impl Secrets {
    /// Nothing is known yet. The first of `verifiers` is the one that leads.
    pub(super) fn new(verifiers: Vec<AttestationClient>, path: PathBuf) -> Self {
        let unheard = || Said::Unheard("not asked yet".to_owned());
        Self { said: Mutex::new(verifiers.iter().map(|_| unheard()).collect()), verifiers, path }
    }

    /// Once the admission was `renewed`, asks for the secret until all of it is there, or nobody has any; then waits for
    /// ever. Tells `supervisor` that what needs the secret may come: at once, unless a share is known to be missing.
    pub(super) async fn keep<T: Tpm>(
        &self,
        prover: &Prover<T>,
        mut renewed: watch::Receiver<u64>,
        supervisor: &Supervisor,
    ) -> Infallible {
        // An error would be that nobody attests any more, and then nobody waits for this either.
        let _renewed = renewed.wait_for(|renewals| *renewals > 0).await.is_ok();
        let mut patience = Patience::default();
        let mut told = String::new();
        loop {
            self.ask(prover).await;
            let gathered = gather(&self.said());
            if !matches!(gathered, Gathered::Missing { .. } | Gathered::Contradiction(_)) && self.settled(&gathered) {
                supervisor.ready();
                return std::future::pending().await;
            }
            if gathered == Gathered::Unknown && told.is_empty() {
                supervisor.ready();
            }
            let words = self.words(&gathered);
            if words != told {
                tracing::error!(event = "agent.no_secret", "the tenant's secret: {words}; asking again");
                told = words;
            }
            supervisor.status("a share of the tenant's secret is missing");
            if matches!(gathered, Gathered::Contradiction(_)) {
                self.forget_shares();
            }
            sleep(patience.next_delay(random())).await;
        }
    }

    /// Writes the secret if it is whole. Answers whether nothing is left to ask for.
    fn settled(&self, gathered: &Gathered) -> bool {
        match gathered {
            Gathered::Whole(secret) => match write_private(&self.path, secret) {
                Ok(()) => {
                    let shares = self.said().iter().filter(|said| matches!(said, Said::Share { .. })).count();
                    let path = self.path.display();
                    tracing::info!(
                        event = "agent.secret",
                        shares,
                        "the tenant's secret is in {path} ({shares} shares)"
                    );
                    true
                }
                Err(error) => {
                    tracing::error!(event = "agent.no_secret", "the tenant's secret: {}", Chain(&error));
                    false
                }
            },
            Gathered::Nothing => true,
            Gathered::Unknown | Gathered::Missing { .. } | Gathered::Contradiction(_) => false,
        }
    }

    /// Asks everybody who has not given a share, and still vouches.
    async fn ask<T: Tpm>(&self, prover: &Prover<T>) {
        let places: Vec<usize> = {
            let said = self.said();
            let open = |place: &usize| matches!(said[*place], Said::Unheard(_) | Said::None);
            (0..said.len()).filter(open).collect()
        };
        let asking = places.iter().map(|place| timeout(ANSWER_LIMIT, self.verifiers[*place].secret()));
        for (place, answer) in places.iter().zip(join_all(asking).await) {
            let said = match answer {
                Ok(Ok(None)) => Said::None,
                Ok(Ok(Some(SealedSecret { shares, sealed }))) => match prover.open(&sealed) {
                    Ok(content) => Said::Share { of: shares, content },
                    Err(error) => Said::Unheard(format!("what it gives does not open: {}", Chain(&error))),
                },
                Ok(Err(error)) => Said::Unheard(Chain(&error).to_string()),
                Err(_elapsed) => Said::Unheard(format!("no answer in {} s", ANSWER_LIMIT.as_secs())),
            };
            let mut known = self.said();
            // It may have ended meanwhile.
            if known[*place] != Said::Withdrawn {
                known[*place] = said;
            }
        }
    }

    /// The verifier at `place` vouches no more. A secret that was made of its share goes.
    pub(super) fn withdraw(&self, place: usize) {
        let before = self.said().get_mut(place).map(|said| std::mem::replace(said, Said::Withdrawn));
        if matches!(before, Some(Said::Share { .. })) {
            self.remove();
        }
    }

    /// Removes the secret: this node is revoked.
    pub(super) fn remove(&self) {
        match std::fs::remove_file(&self.path) {
            Ok(()) => tracing::warn!(event = "agent.secret_gone", "removed {}", self.path.display()),
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => {
                tracing::error!(event = "agent.secret_left", "removing {}: {source}", self.path.display());
            }
        }
    }

    /// Shares that do not fit each other may be of two secrets, one of which has taken the other's place.
    fn forget_shares(&self) {
        for said in self.said().iter_mut().filter(|said| matches!(said, Said::Share { .. })) {
            *said = Said::Unheard("its share fits no other".to_owned());
        }
    }

    /// What is missing, and what each verifier said.
    fn words(&self, gathered: &Gathered) -> String {
        let mut words = match gathered {
            Gathered::Missing { have, of } => format!("it has {of} shares, and {} of them is missing", of - have),
            Gathered::Contradiction(problem) => (*problem).to_owned(),
            Gathered::Unknown => "not every verifier answers".to_owned(),
            Gathered::Whole(_) => "it cannot be written".to_owned(),
            Gathered::Nothing => "there is none".to_owned(),
        };
        for (verifier, said) in self.verifiers.iter().zip(self.said().iter()) {
            let address = verifier.address();
            let _infallible = match said {
                Said::Unheard(why) => write!(words, "; {address}: {}", crate::client::printable(why)),
                Said::None => write!(words, "; {address} has none of it"),
                Said::Share { of, .. } => write!(words, "; {address} gave one of {of}"),
                Said::Withdrawn => write!(words, "; {address} vouches no more"),
            };
        }
        words
    }

    fn said(&self) -> MutexGuard<'_, Vec<Said>> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long a verifier may take for its answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;
    use assay_wire::attestation::split_secret;
    use proptest::prelude::*;

    fn share(of: u8, content: &[u8]) -> Said {
        Said::Share { of, content: Zeroizing::new(content.to_vec()) }
    }

    fn unheard() -> Said {
        Said::Unheard(String::new())
    }

    fn whole(content: &[u8]) -> Gathered {
        Gathered::Whole(Zeroizing::new(content.to_vec()))
    }

    #[test]
    fn one_verifier_may_have_all_of_it() {
        assert_eq!(gather(&[share(1, b"key")]), whole(b"key"));
        assert_eq!(gather(&[Said::None, share(1, b"key"), unheard()]), whole(b"key"));
        assert_eq!(gather(&[Said::None, Said::None]), Gathered::Nothing);
        assert_eq!(gather(&[Said::None, unheard()]), Gathered::Unknown);
        assert_eq!(gather(&[Said::None, Said::Withdrawn]), Gathered::Nothing);
    }

    #[test]
    fn one_share_of_two_is_nothing() {
        for other in [Said::None, unheard(), Said::Withdrawn] {
            assert_eq!(gather(&[share(2, b"a"), other]), Gathered::Missing { have: 1, of: 2 });
        }
    }

    #[test]
    fn what_does_not_fit_is_no_secret() {
        for (said, word) in [
            // A verifier that has a share says that it is all of it.
            ([share(2, b"a"), share(1, b"b")], "number"),
            ([share(1, b"a"), share(1, b"b")], "more"),
            ([share(0, b"a"), Said::None], "more"),
            ([share(2, b"a"), share(2, b"bc")], "length"),
        ] {
            let gathered = gather(&said);
            assert!(matches!(gathered, Gathered::Contradiction(why) if why.contains(word)), "{gathered:?}");
        }
    }

    proptest! {
        #[test]
        fn all_shares_are_the_secret_and_any_fewer_are_not(
            secret in proptest::collection::vec(any::<u8>(), 1..64),
            masks in proptest::collection::vec(any::<u8>(), 0..7),
            lost in any::<proptest::sample::Index>(),
        ) {
            let masks: Vec<_> = masks.iter().map(|mask| vec![*mask; secret.len()]).collect();
            let shares = split_secret(&secret, masks).unwrap();
            let of = u8::try_from(shares.len()).unwrap();
            let mut said: Vec<_> = shares.iter().map(|content| share(of, content)).collect();
            said.push(Said::None);
            prop_assert_eq!(gather(&said), whole(&secret));
            said[lost.index(shares.len())] = unheard();
            let have = shares.len() - 1;
            let expected = if have == 0 { Gathered::Unknown } else { Gathered::Missing { have, of: shares.len() } };
            prop_assert_eq!(gather(&said), expected);
        }
    }
}
