//! The interface for reports of confidential guests, against folders that behave like the kernel's. The kernel's own
//! was not run: no machine with Intel TDX was at hand.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says so by a panic")]

mod support;

use assay_ramdisk_agent::tee::TeeQuotes;
use assay_ramdisk_agent::tee::tsm::{Interface, TsmError};
use assay_tpm::public::Public;
use assay_wire::evidence::{MAX_TEE_QUOTE_BYTES, TeeQuote};
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};
use support::tsm;

type Make = fn(&Path) -> io::Result<()>;

/// What a kernel gives for some report data. No report is left behind, whatever it does.
fn quoted(make: Make) -> Result<Option<Vec<u8>>, TsmError> {
    let reports = tempfile::tempdir().unwrap();
    let quote = tsm::interface(reports.path(), make).tdx_quote(&[7; 64]);
    assert!(!reports.path().join("assay-agent").exists(), "a report was left behind");
    quote
}

#[test]
fn a_trust_domain_has_a_quote_of_what_was_written() {
    assert_eq!(quoted(tsm::tdx).unwrap().unwrap(), tsm::quote_of(&[7; 64]).quote);
    assert_eq!(quoted(tsm::large).unwrap().unwrap().len(), MAX_TEE_QUOTE_BYTES);
}

#[test]
fn what_is_no_trust_domain_has_no_quote_and_no_error() {
    assert!(quoted(tsm::sev).unwrap().is_none());
    assert!(quoted(tsm::no_guest).unwrap().is_none());
    let folder = tempfile::tempdir().unwrap();
    let none = Interface { reports: folder.path().join("none"), ..Interface::default() };
    assert!(none.tdx_quote(&[7; 64]).unwrap().is_none());
}

#[test]
fn a_report_of_anything_else_than_what_was_written_is_not_sent() {
    assert_eq!(quoted(tsm::raced_once).unwrap().unwrap(), tsm::quote_of(&[7; 64]).quote);
    for make in [tsm::raced as Make, tsm::deaf] {
        assert!(matches!(quoted(make), Err(TsmError::NotOurs { .. })));
    }
}

#[test]
fn an_interface_that_fails_says_where() {
    let error = quoted(tsm::no_quote).unwrap_err();
    assert!(matches!(&error, TsmError::Io { doing: "reading", path, .. } if path.ends_with("outblob")), "{error}");
    let error = quoted(tsm::endless).unwrap_err();
    assert!(matches!(error, TsmError::TooLarge { limit: MAX_TEE_QUOTE_BYTES, .. }), "{error}");
    let refused: Make = |_| Err(io::Error::from(io::ErrorKind::PermissionDenied));
    assert!(matches!(quoted(refused), Err(TsmError::Io { doing: "making the report", .. })));
}

#[test]
fn a_report_that_a_killed_agent_left_is_made_anew() {
    let reports = tempfile::tempdir().unwrap();
    tsm::no_quote(&reports.path().join("assay-agent")).unwrap();
    let quote = tsm::interface(reports.path(), tsm::tdx).tdx_quote(&[7; 64]);
    assert_eq!(quote.unwrap().unwrap(), tsm::quote_of(&[7; 64]).quote);
}

#[test]
fn evidence_goes_without_a_quote_and_one_warning_until_it_works_again() {
    let reports = tempfile::tempdir().unwrap();
    let tee = TeeQuotes::new(tsm::interface(reports.path(), tsm::third_is_good));
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
    tracing::subscriber::with_default(subscriber, || {
        let warnings = || String::from_utf8_lossy(&log.0.lock().unwrap()).matches("agent.no_tee_quote").count();
        assert_eq!((tee.answering(&[1; 32], &AK), warnings()), (Vec::new(), 1));
        assert_eq!((tee.answering(&[2; 32], &AK), warnings()), (Vec::new(), 1));
        let name = Public::parse(&AK).unwrap().name().as_bytes().to_vec();
        let good = tsm::quote_of(&TeeQuote::report_data(&[3; 32], &name));
        assert_eq!((tee.answering(&[3; 32], &AK), warnings()), (vec![good], 1));
        assert_eq!((tee.answering(&[4; 32], &AK), warnings()), (Vec::new(), 2));
    });
}

/// What was logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(octets)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `TPMT_PUBLIC` of a P-256 key.
const AK: [u8; 88] = {
    let mut public = [0; 88];
    let head = [0, 0x23, 0, 0x0b, 0, 5, 0, 0x72, 0, 0, 0, 0x10, 0, 0x18, 0, 0x0b, 0, 3, 0, 0x10, 0, 32];
    let mut at = 0;
    while at < head.len() {
        public[at] = head[at];
        at += 1;
    }
    public[head.len() + 33] = 32;
    public
};
