//! Continuous attestation: on real firmware in the run that `boot_path` looks at too, and on nodes without firmware.

use crate::boot_path::run;
use crate::play::play;
use assay_wire::step::Step;

/// n1's tenant went on attesting; then a program ran there that the policy does not know.
#[test]
fn attest() {
    let played = run();
    let position = |name: &str| played.events.iter().position(|event| event.is(name, "n1"));
    let (booted, renewed) = (position(Step::TenantBooted.event()), position("node.renewed"));
    let (measured, revoked) = (position("tenant.measured"), position("node.revoked"));
    let order = [booted, renewed, measured, revoked];
    assert!(order.iter().all(Option::is_some) && order.is_sorted(), "{order:?}\n{}", played.output);
    assert!(played.event("tenant.measured").number("entries") > Some(5.0), "the tenant's kernel measures what runs");
    let memory = played.event("node.renewed").number("memory_kib");
    assert!(memory.is_some_and(|memory| memory > 0.0 && memory < 65_536.0), "{memory:?} KiB");
    println!("the agent in the tenant's system had {memory:?} KiB resident at most");
    let reasons = played.event("node.revoked").fields()["reasons"].to_string();
    assert!(reasons.contains("unknown-program"), "{reasons}");
}

#[test]
fn silence() {
    let played = play("silence");
    assert!(played.events.iter().any(|event| event.is("node.renewed", "s1")), "{}", played.output);
    let seconds = played.event("silence.closed").number("seconds");
    assert!(seconds < Some(60.0), "{seconds:?}");
}

/// Bad evidence cuts a node off within a second; `make bench` measures it a hundred times.
#[test]
fn revoke() {
    let played = play("revoke");
    let cuts: Vec<_> = played.events.iter().filter(|event| event.name() == "node.cut_off").collect();
    assert_eq!(cuts.len(), 5, "{}", played.output);
    for cut in cuts {
        assert!(cut.fields()["reasons"].to_string().contains("PCR 12"), "{:?}", cut.fields());
        for figure in ["port_ms", "frames_ms", "session_ms"] {
            // The bar is 1 s; a machine that runs other tests meanwhile gets more.
            assert!(cut.number(figure) < Some(5000.0), "{figure}: {:?}", cut.fields());
        }
    }
}
