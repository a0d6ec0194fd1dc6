//! A kernel with the report interface of confidential guests, as far as folders and pipes can be one: `inblob` takes
//! what is written when it is closed, `generation` counts it, and `outblob` gives no octet before.

use assay_ramdisk_agent::tee::tsm::Interface;
use assay_wire::evidence::{MAX_TEE_QUOTE_BYTES, TeeKind, TeeQuote};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::path::Path;

/// The interface in a folder, whose new reports are filled by `make`.
pub(crate) fn interface(reports: &Path, make: fn(&Path) -> io::Result<()>) -> Interface {
    Interface { reports: reports.to_owned(), make, remove: |report| fs::remove_dir_all(report) }
}

/// What a good kernel gives for these 64 octets.
pub(crate) fn quote_of(report_data: &[u8]) -> TeeQuote {
    TeeQuote { kind: TeeKind::Tdx, quote: [b"quote of ", report_data].concat() }
}

/// A trust domain of Intel TDX.
pub(crate) fn tdx(report: &Path) -> io::Result<()> {
    kernel(report, "tdx_guest\n", |input| (1, quote_of(&input).quote))
}

/// Another maker's guest.
pub(crate) fn sev(report: &Path) -> io::Result<()> {
    kernel(report, "sev_guest\n", |_| panic!("a report of another maker's was asked for"))
}

/// No guest of any maker's.
pub(crate) fn no_guest(_report: &Path) -> io::Result<()> {
    Err(io::Error::from(nix::errno::Errno::ENXIO))
}

/// Somebody else writes to each of our reports.
pub(crate) fn raced(report: &Path) -> io::Result<()> {
    kernel(report, "tdx_guest\n", |_| (2, quote_of(&[0xee; 64]).quote))
}

/// The same, but only to the first.
pub(crate) fn raced_once(report: &Path) -> io::Result<()> {
    if report_number(report)? == 1 { raced(report) } else { tdx(report) }
}

/// The kernel does not take what is written, and tells nobody.
pub(crate) fn deaf(report: &Path) -> io::Result<()> {
    kernel(report, "tdx_guest\n", |_| (0, quote_of(&[0; 64]).quote))
}

/// A quote that is none.
pub(crate) fn endless(report: &Path) -> io::Result<()> {
    kernel(report, "tdx_guest\n", |_| (1, vec![0; MAX_TEE_QUOTE_BYTES + 1]))
}

/// The largest that may be.
pub(crate) fn large(report: &Path) -> io::Result<()> {
    kernel(report, "tdx_guest\n", |_| (1, vec![0; MAX_TEE_QUOTE_BYTES]))
}

/// The host makes no quote: reading fails.
pub(crate) fn no_quote(report: &Path) -> io::Result<()> {
    attributes(report, "tdx_guest\n")?;
    fs::write(report.join("inblob"), "")?;
    fs::create_dir(report.join("outblob"))
}

/// The third report is good, the others fail.
pub(crate) fn third_is_good(report: &Path) -> io::Result<()> {
    if report_number(report)? == 3 { tdx(report) } else { no_quote(report) }
}

fn attributes(report: &Path, provider: &str) -> io::Result<()> {
    fs::create_dir(report)?;
    fs::write(report.join("provider"), provider)?;
    fs::write(report.join("generation"), "0\n")
}

/// Which report of the folder it is, from 1.
fn report_number(report: &Path) -> io::Result<usize> {
    let count = report.with_file_name("count");
    let reports = fs::read(&count).unwrap_or_default().len() + 1;
    fs::write(count, vec![0; reports])?;
    Ok(reports)
}

/// Makes a report's folder and stands behind its attributes. `answer` gives the generation after an input, and the
/// report of it.
fn kernel(report: &Path, provider: &str, answer: fn(Vec<u8>) -> (u64, Vec<u8>)) -> io::Result<()> {
    attributes(report, provider)?;
    let (inblob, outblob) = (report.join("inblob"), report.join("outblob"));
    for pipe in [&inblob, &outblob] {
        mkfifo(pipe, Mode::S_IRUSR | Mode::S_IWUSR)?;
    }
    let generation = report.join("generation");
    std::thread::spawn(move || {
        let mut input = Vec::new();
        File::open(inblob)?.read_to_end(&mut input)?;
        assert_eq!(input.len(), 64, "Intel TDX takes 64 octets and no others");
        let (count, output) = answer(input);
        fs::write(generation, format!("{count}\n"))?;
        // Nobody reads if the agent has given up.
        OpenOptions::new().write(true).open(outblob)?.write_all(&output)
    });
    Ok(())
}
